import contextlib
import itertools
import subprocess
import sys

import pytest
import torch

from mmpeft.data.tensor_cache import TensorCache, latent_key, text_key
from mmpeft.errors import DataError


def latents():
    return {
        "mean": torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(5),
    }


def never():
    raise AssertionError("this entry is there already")


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def entry(folder):
    (path,) = folder.rglob("*.safetensors")
    return path


def test_entry_is_made_once_and_read_back_bit_for_bit(tmp_path):
    made = TensorCache(tmp_path / "cache").get("abc", latents)
    assert same(made, latents())
    assert same(TensorCache(tmp_path / "cache").get("abc", never), latents())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["abc.safetensors"]


def test_what_is_returned_needs_no_gradient(tmp_path):
    made = TensorCache(tmp_path).get("abc", lambda: {"x": torch.ones(2, requires_grad=True) * 2})
    assert not made["x"].requires_grad


@pytest.mark.parametrize(
    "damage", ["torn", "empty", "flipped bit in the data", "flipped bit in a name", "other key"]
)
def test_damaged_entry_is_made_again(tmp_path, damage):
    cache = TensorCache(tmp_path)
    cache.get("abc", latents)
    path = entry(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "torn":
        content = content[:-1]
    elif damage == "empty":
        content = b""
    elif damage == "flipped bit in the data":
        content[-1] ^= 1
    elif damage == "flipped bit in a name":
        content[content.index(b"mean")] ^= 1
    else:
        cache.get("abd", lambda: {"mean": torch.zeros(1)})
        content = (tmp_path / "ab" / "abd.safetensors").read_bytes()
    path.write_bytes(content)
    assert same(cache.get("abc", latents), latents())
    assert same(cache.get("abc", never), latents())


def test_an_error_while_making_leaves_no_entry(tmp_path):
    with pytest.raises(AssertionError):
        TensorCache(tmp_path).get("abc", never)
    assert not list(tmp_path.rglob("*.safetensors"))


FILL_LIMITED_DISK = """
import resource, sys, torch
from mmpeft.data.tensor_cache import TensorCache
from mmpeft.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    TensorCache(sys.argv[1]).get("abc", lambda: {"x": torch.zeros(1000)})
except DataError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_a_clear_error_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", FILL_LIMITED_DISK, str(tmp_path)]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot take an entry of 4" in message
    assert "bytes free): File too large; make room there" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"the cache .*cache cannot take an entry of \d+ bytes"):
        TensorCache(tmp_path / "cache").get("abc", latents)


WRITE_ENTRIES = """
import sys, torch
from mmpeft.data.tensor_cache import TensorCache
cache = TensorCache(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    got = cache.get(f"key{number}", lambda: {"x": torch.full((500,), float(number))})
    assert torch.equal(got["x"], torch.full((500,), float(number)))
"""


def test_processes_that_write_the_same_entries_all_get_whole_ones(tmp_path):
    command = [sys.executable, "-c", WRITE_ENTRIES, str(tmp_path)]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(3)
        ]
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 60
    for number in range(60):
        assert TensorCache(tmp_path).get(f"key{number}", never)["x"][0] == number


def test_anything_else_has_another_latent_key():
    first = ("digest", (64, 64), 0.5, 0.5, False, "vae")
    others = ("other", (80, 48), 0.25, 0.75, True, "other vae")
    variants = [latent_key(*choice) for choice in itertools.product(*zip(first, others, strict=True))]
    assert len(set(variants)) == 2**6
    assert latent_key(*first) == variants[0] != latent_key("digest", (48, 80), 0.5, 0.5, False, "vae")


def test_anything_else_has_another_text_key():
    first, others = ("a cat", "tokenizer", "encoder", 0), ("a dog", "other", "other encoder", 1)
    variants = [text_key(*choice) for choice in itertools.product(*zip(first, others, strict=True))]
    assert len(set(variants)) == 2**4
    assert text_key("a", "bc", "d", 0) != text_key("a", "b", "cd", 0)


def test_other_code_has_another_key(monkeypatch):
    before = latent_key("digest", (64, 64), 0.5, 0.5, False, "vae"), text_key("a cat", "t", "e", 0)
    monkeypatch.setattr("mmpeft.data.tensor_cache.CODE_VERSION", 10**6)
    after = latent_key("digest", (64, 64), 0.5, 0.5, False, "vae"), text_key("a cat", "t", "e", 0)
    assert not set(before) & set(after)
