"""The two files on disk: replaced as one, whatever happens; read with suspicion."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphpatch
from graphpatch.checkpoint import pair
from tests.checkpoint.common import LORA, edit, refused, rehash, saved
from tests.toys import lm

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def marked(value: float) -> graphpatch.Patch:
    """A patch whose rules and whose weights both say `value`, so that a mixture of two shows."""
    patch = graphpatch.apply(lm(), graphpatch.parse(f"{LORA}\n# {value}"))
    for tensor in patch.adapter_state_dict().values():
        tensor.fill_(value)
    return patch


def said(folder: Path) -> float:
    """What the pair in the folder says, both halves of it."""
    manifest, tensors = pair.read_pair(folder)
    (value,) = {x for tensor in tensors.values() for x in tensor.unique().tolist()}
    assert manifest.rules["files"][0]["text"].endswith(f"# {value}")
    return value


# ── writing ──


@pytest.mark.parametrize("count", [0, 2])
def test_one_patch_at_a_time(tmp_path, count):
    several = [marked(1.0) for _ in range(count)]
    for act in (
        lambda: graphpatch.save_adapter(several, tmp_path / "a"),
        lambda: graphpatch.to_peft(several, tmp_path / "a"),
        lambda: graphpatch.load_weights(several, tmp_path / "a"),
    ):
        with pytest.raises(graphpatch.ApplyError) as caught:
            act()
        assert caught.value.code == "GP954"
    assert not any(tmp_path.iterdir())


def test_the_same_patch_gives_the_same_bytes(tmp_path):
    patch = marked(1.0)
    for name in ("a", "b"):
        graphpatch.save_adapter(patch, tmp_path / name)
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_bytes_do_not_hang_on_the_process(tmp_path):
    program = """
import sys, graphpatch
from tests.checkpoint.test_files import marked
graphpatch.save_adapter(marked(1.0), sys.argv[1], hash_base=True)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], env=environment, cwd=ROOT, check=True)
    graphpatch.save_adapter(marked(1.0), tmp_path / "b", hash_base=True)
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_other_files_of_the_folder_stay_and_permissions_are_the_usual(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "adapter-final.safetensors").write_text("mine")
    graphpatch.save_adapter(marked(1.0), tmp_path)
    graphpatch.save_adapter(marked(2.0), tmp_path)
    names = ["README.md", "adapter-final.safetensors", "adapter.json", "adapter.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names and said(tmp_path) == 2.0
    modes = {(tmp_path / name).stat().st_mode for name in names}
    assert len(modes) == 1


@posix
def test_killed_at_any_file_operation_the_old_or_the_new_pair_is_there(tmp_path):
    old, new, third = marked(1.0), marked(2.0), marked(3.0)
    found = []
    for kill_at in range(1, 200):
        folder = tmp_path / str(kill_at)
        graphpatch.save_adapter(old, folder)
        if not killed(new, folder, kill_at):
            break
        found.append(said(folder))
        # Neither what is left is in the way of the next.
        graphpatch.save_adapter(new if kill_at % 2 else third, folder)
        assert said(folder) == (2.0 if kill_at % 2 else 3.0)
        assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    assert found == sorted(found) and {1.0, 2.0} == {*found} and len(found) > 8


def killed(patch: graphpatch.Patch, folder: Path, at: int) -> bool:
    """Save in a child that is killed, as by kill -9, before its n-th operation on a file; False if it ends before."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, args):
            nonlocal count
            if event in (
                "open",
                "os.rename",
                "os.remove",
                "os.mkdir",
                "os.rmdir",
                "os.chmod",
                "shutil.rmtree",
                "os.listdir",
            ):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            graphpatch.save_adapter(patch, folder)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@posix
def test_killed_at_any_time_the_old_or_the_new_pair_is_there(tmp_path):
    program = """
import sys, graphpatch
from tests.checkpoint.test_files import marked
a, b = marked(1.0), marked(2.0)
while True:
    graphpatch.save_adapter(a, sys.argv[1])
    graphpatch.save_adapter(b, sys.argv[1])
    print("saved", flush=True)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    chance = random.Random(0)
    for _ in range(2):
        command = [sys.executable, "-c", program, str(tmp_path)]
        with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"saved\n"
            time.sleep(chance.uniform(0, 0.1))
            child.kill()
        assert said(tmp_path) in (1.0, 2.0)
    graphpatch.save_adapter(marked(3.0), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "adapter.safetensors"] and said(tmp_path) == 3.0


@posix
def test_a_full_disk_leaves_the_old_pair(tmp_path):
    import resource

    graphpatch.save_adapter(marked(1.0), tmp_path)
    patch = marked(2.0)
    child = os.fork()
    if child == 0:  # no file may grow beyond this: the write fails as it does where the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            graphpatch.save_adapter(patch, tmp_path)
        except graphpatch.Error as error:
            os._exit(40 if error.code == "GP604" else 41)
        except BaseException:
            os._exit(42)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 40
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "adapter.safetensors"] and said(tmp_path) == 1.0


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_leaves_the_old_pair(tmp_path, monkeypatch, fails):
    graphpatch.save_adapter(marked(1.0), tmp_path)
    patch, count, replace = marked(2.0), 0, os.replace

    def full(*args):
        nonlocal count
        count += 1
        if count == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(graphpatch.Error, match=r"GP604(.|\n)*No space left on device"):
        graphpatch.save_adapter(patch, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "adapter.safetensors"] and said(tmp_path) == 1.0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(graphpatch.Error, match="GP604"):
        graphpatch.save_adapter(marked(1.0), tmp_path / "file" / "adapter")


def test_a_pair_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    graphpatch.save_adapter(marked(1.0), tmp_path)
    patch, digest = marked(2.0), pair._digest

    def replaced_meanwhile(path):
        monkeypatch.setattr(pair, "_digest", digest)
        graphpatch.save_adapter(patch, tmp_path)
        return digest(path)

    monkeypatch.setattr(pair, "_digest", replaced_meanwhile)
    assert said(tmp_path) == 2.0


# ── reading ──


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "adapter")[0]


def test_no_adapter_is_there(tmp_path, folder):
    assert "there is no adapter in" in refused("GP601", lm(), tmp_path / "none")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert "PEFT's format" in refused("GP601", lm(), tmp_path / "peft")
    assert "give that which holds the file" in refused("GP601", lm(), folder / "adapter.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 5000, -1])
def test_truncated_tensors(folder, keep):
    path = folder / "adapter.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert "cut off, or changed since" in refused("GP603", lm(), folder)
    rehash(folder)  # and where the json vouches for it
    assert "no safetensors file" in refused("GP603", lm(), folder)


def test_tensors_that_are_missing_or_of_another_save(tmp_path, folder):
    other, _ = saved(tmp_path / "other", LORA.replace("rank=4", "rank=3"))
    os.replace(other / "adapter.safetensors", folder / "adapter.safetensors")
    assert "not the file that adapter.json was written with" in refused("GP603", lm(), folder)
    (folder / "adapter.safetensors").unlink()
    assert "is missing" in refused("GP603", lm(), folder)


HEADERS = {
    "huge": struct.pack("<Q", 2**63),
    "negative": struct.pack("<q", -1),
    "beyond the end": struct.pack("<Q", 2**20) + b"{}",
    "no json": struct.pack("<Q", 4) + b"\xff\xfe{{",
    "deep": struct.pack("<Q", 20000) + b"[" * 20000,
    "offsets": struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}  ',
    "pickle": b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_tensors(folder, name):
    (folder / "adapter.safetensors").write_bytes(HEADERS[name])
    rehash(folder)
    refused("GP603", lm(), folder)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    rehash(folder)


def test_tensors_that_the_json_does_not_speak_of(folder):
    rewrite(folder, lambda tensors: tensors.update(extra=tensors.pop("lm_head.lora_A")))
    text = refused("GP614", lm(), folder)
    assert "- lm_head.lora_A   missing" in text and "+ extra   unexpected" in text


def test_names_that_the_model_does_not_have(folder):
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    edit(folder, lambda body: body["tensors"]["base"].append("extra"))
    assert "+ extra   unexpected" in refused("GP614", lm(), folder)


def test_shapes_and_types_that_the_model_does_not_have(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.lora_A": torch.zeros(4, 17)}))
    assert "lm_head.lora_A: [4, 17], and the model has [4, 16]" in refused("GP615", lm(), folder)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.lora_A": torch.zeros(4, 16, dtype=torch.int64)}))
    assert "lm_head.lora_A: int64, and the model has float32" in refused("GP615", lm(), folder)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_json(folder, share):
    path = folder / "adapter.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "not JSON, or cut off" in refused("GP602", lm(), folder)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"format": 1}', b"[" * 100000, b"NaN", b'"' + b"a" * 9]
)
def test_json_that_is_no_adapter(folder, text):
    (folder / "adapter.json").write_bytes(text)
    refused("GP602", lm(), folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), 2),
        (("format",), True),
        (("format",), {"a": "b" * 1000}),
        (("adapter",), 3),
        (("allow_import",), "os.*"),
        (("changes",), [{"op": "lora"}]),
        (("changes",), {}),
        (("rules",), {}),
        (("rules",), {"format": 1, "files": []}),
        (("rules", "files"), [{"name": "x", "text": "patch", "sha256": "", "rules": {"statements": []}}]),
        (("tensors",), None),
        (("tensors", "sha256"), "../../../etc/passwd"),
        (("tensors", "added"), [1]),
        (("base", "tree"), ["graphpatch tree 1"]),
        (("base", "tree"), "graphpatch tree 1"),
        (("base", "fingerprint"), "0" * 64),
    ],
)
def test_hostile_json(folder, where, value):
    def change(body):
        for key in where[:-1]:
            body = body[key]
        body[where[-1]] = value

    edit(folder, change)
    assert len(refused("GP602", lm(), folder)) < 1500


def test_rules_that_would_import_are_not_trusted(folder):
    rules = graphpatch.parse('patch lm_head with replace(class="os.system")')
    edit(folder, lambda body: body.update(rules=json.loads(rules.to_json()), allow_import=["*"], changes=[]))
    refused("GP613", lm(), folder)


def test_what_a_newer_version_adds_is_passed_over(folder):
    edit(folder, lambda body: body.update(news={"a": 1}))
    assert graphpatch.load_adapter(lm(), folder).changes


def test_a_reader_of_files_runs_no_pickle():
    room = Path(pair.__file__).parent
    text = "\n".join(path.read_text() for path in room.glob("*.py"))
    assert "torch.load" not in text and "torch.save" not in text and "import pickle" not in text
