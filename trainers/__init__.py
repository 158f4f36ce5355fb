"""The trainers; installed and imported as `mmpeft.trainers`."""

if __name__ != "mmpeft.trainers":
    raise ImportError(
        "import this package as mmpeft.trainers: under two names every class in it would exist twice"
    )
