"""Drop-in pipelines with a bank inside; installed and imported as `mmpeft.pipelines`."""

if __name__ != "mmpeft.pipelines":
    raise ImportError(
        "import this package as mmpeft.pipelines: under two names every class in it would exist twice"
    )

from mmpeft.pipelines.stable_diffusion import (
    MmpeftStableDiffusionPipeline as MmpeftStableDiffusionPipeline,
)
