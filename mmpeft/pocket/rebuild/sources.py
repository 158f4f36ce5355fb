"""Fetch the published packages that the pocket base is made from."""

import shutil
import subprocess
import tarfile
from pathlib import Path

from mmpeft.errors import DataError, MissingDependency

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "emojibase-data": "17.0.0",
    "emojilib": "4.0.3",
}
"""npm package -> exact version; LICENSES.md beside the pocket base says what each may be used for"""


def fetch_packages(folder: Path) -> None:
    """Download and unpack every package, `@iconify-json/noto` into `folder/noto` and so on.

    npm fetches from whatever registry it is set up for.

    Raises:
        MissingDependency: npm is not installed.
        DataError: npm could not get a package; its last words are in the message.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependency("npm", "fetching the drawings", "your system's package manager (Node.js)")
    for package, version in PACKAGES.items():
        target = folder / package.rpartition("/")[2]
        target.mkdir(parents=True)
        command = [npm, "pack", "--silent", f"{package}@{version}", "--pack-destination", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"npm could not fetch {package}@{version}: {done.stderr.strip()[-300:]}")
        archive = target / done.stdout.split()[-1]
        with tarfile.open(archive) as opened:
            opened.extractall(target, filter="data")
        archive.unlink()
        for unpacked in (target / "package").iterdir():  # npm puts everything under package/
            unpacked.rename(target / unpacked.name)
        (target / "package").rmdir()
