"""The recipe that rebuilds the embedded "pocket" base from published image packages.

    python -m mmpeft.pocket.rebuild WORK_FOLDER            # about five hours on one core
    python -m mmpeft.pocket.rebuild WORK_FOLDER --smoke    # about a minute: every stage, on six concepts

The five hours are the measured seconds of a step times the steps: autoencoder 0.7 h, CLIP 0.5 h, denoiser 3.3 h,
judges 0.2 h. On a shared machine, OMP_NUM_THREADS=1 is the fastest.

It needs npm (which fetches the packages, about 28 MB) and `pip install "mmpeft[pocket]"` (which renders their
drawings). One stage follows the other, each in a folder of its own; a folder that is there is not made again,
so a stopped rebuild goes on at the stage that it was in:

    packages/     sources.py       the published packages, exact versions
    drawings/     drawings.py      five drawing styles of 1,142 concepts, 64 x 64 RGBA
    tokenizer/    tokenizer.py     byte-pair encoding of captions.py's captions
    autoencoder/  autoencoder.py   AutoencoderKL, 64 x 64 x 3 to 16 x 16 x 4
    clip/         clip.py          CLIPModel, from whose text tower the next stage starts
    denoiser/     denoiser.py      UNet and text encoder, together, on 219 concepts in the Noto style
    judges/       judges.py        which concept, which style
    pocket/       assembly.py      what ships: sd, clip, judges, images (folders.py)
    report.json   report.py        how many of the base's pictures the concept judge names rightly
"""
