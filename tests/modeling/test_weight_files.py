"""Checkpoint files in and out, and the hash of what they hold."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import pickle
import resource
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from ttt_video.errors import UserError
from ttt_video.modeling import weights as W
from ttt_video.modeling._unpickle import RefusedContent, safe_unpickle

WEIGHTS = {
    "backbone.patch_embed.proj.weight": torch.randn(8, 4, 4, 4),
    "backbone.patch_embed.proj.bias": torch.randn(8),
    "backbone.relative_position_index": torch.arange(9).view(3, 3),
    "sem_seg_head.predictor.query_feat.weight": torch.randn(5, 8),
    "criterion.empty_weight": torch.tensor([1.0, 1.0, 0.1]),
}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_every_format_gives_back_what_was_written(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    W.write_checkpoint(WEIGHTS, path, {"made by": "a test"})
    assert same(W.read_checkpoint(path), WEIGHTS)
    assert os.listdir(tmp_path) == [path.name]  # no temporary file stays behind


def test_the_same_weights_and_metadata_are_the_same_bytes(tmp_path):
    metadata = {str(k): "x" * k for k in range(20)}  # safetensors itself writes a random order
    written = []
    for number in range(3):
        W.save_safetensors(WEIGHTS, tmp_path / f"{number}.safetensors", metadata)
        written.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata() == {**metadata, "format": "pt"}
    assert (int.from_bytes(written[0][:8], "little")) % 8 == 0  # readers want aligned data


def test_the_bytes_decide_the_format_not_the_name(tmp_path):
    for i, (suffix, kind) in enumerate(
        [(".safetensors", "safetensors"), (".pth", "torch"), (".pkl", "pickle")]
    ):
        made = tmp_path / f"{i}{suffix}"
        W.write_checkpoint(WEIGHTS, made)
        other = made.rename(tmp_path / f"model_final_{i}.pkl")
        assert W.checkpoint_format(other) == kind
        assert same(W.read_checkpoint(other), WEIGHTS)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w, "optimizer": {"state": {}, "param_groups": []}, "iteration": 7},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}, "epoch": 3},
    ],
    ids=["plain", "detectron2", "lightning-and-ddp"],
)
def test_torch_layouts(tmp_path, wrap, legacy):
    path = tmp_path / "w.pth"
    torch.save(wrap(WEIGHTS), path, _use_new_zipfile_serialization=not legacy)
    assert same(W.read_checkpoint(path), WEIGHTS)


@pytest.mark.parametrize("protocol", range(6))
def test_model_zoo_pickles_of_every_protocol(tmp_path, protocol):
    arrays = collections.OrderedDict((k, v.numpy()) for k, v in WEIGHTS.items())
    zoo = {"model": arrays, "__author__": "someone", "matching_heuristics": True}
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(zoo, protocol=protocol))
    assert same(W.read_checkpoint(path), WEIGHTS)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_either_numpy(tmp_path, protocol):
    """numpy 2 writes numpy._core where numpy 1 writes numpy.core; both have to be read by both."""
    data = pickle.dumps({"a": np.arange(6.0).reshape(2, 3)}, protocol=2)
    core, private = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    assert (core in data) != (private in data)
    for module in (core, private):
        swapped = data.replace(core, module).replace(private, module)
        read = safe_unpickle(io.BytesIO(swapped))
        np.testing.assert_array_equal(read["a"], np.arange(6.0).reshape(2, 3))


def test_a_python_2_pickle():
    """What Python 2's cPickle, protocol 2, wrote for {'w': array([1., 2.], float32)}.

    Its strings are byte strings: the raw values come as one with bytes beyond ASCII.
    """
    data = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tbs."
    )
    np.testing.assert_array_equal(safe_unpickle(io.BytesIO(data))["w"], np.float32([1, 2]))


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(["f2", "<f4", ">f4", "f8", "i1", ">i2", "i8", "u1", "?"]),
    order=st.sampled_from(["C", "F"]),
    protocol=st.integers(0, 5),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_arrays_survive_the_safe_unpickler(shape, dtype, order, protocol, strided):
    count = int(np.prod(shape))
    array = np.asarray(np.arange(count).reshape(shape), dtype=dtype, order=order)
    if strided and shape:
        array = array[::-1]
    read = safe_unpickle(io.BytesIO(pickle.dumps([array], protocol=protocol)))[0]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype.newbyteorder("=")
    torch.from_numpy(np.ascontiguousarray(read))  # writable and native: torch takes it


def test_torch_tensors_inside_a_plain_pickle():
    """Mask2Former's ImageNet Swin .pkl files are dicts of torch tensors, pickled directly."""
    stored = {
        "a": torch.randn(3, 4).t(),
        "b": nn.Parameter(torch.ones(2)),
        "c": torch.ones(2).half(),
    }
    read = safe_unpickle(io.BytesIO(pickle.dumps(stored)))
    assert same(read, {k: v.detach() for k, v in stored.items()})


class Trap:
    """Calls a function when it is unpickled the ordinary way."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path, protocol):
    mark = tmp_path / "ran"
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": Trap(os.mkdir, str(mark))}}, protocol=protocol))
    with pytest.raises(UserError, match=r"refused to load .*w\.pkl: it holds (posix|nt)\.mkdir"):
        W.read_checkpoint(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # the trap works: nothing but the refusal held it back


def test_a_trap_inside_a_pickled_tensor_is_refused_too(tmp_path):
    """torch.storage._load_from_bytes unpickles its argument: it has to be restricted as well."""
    mark = tmp_path / "ran"
    inner = io.BytesIO()
    torch.save(Trap(os.mkdir, str(mark)), inner, _use_new_zipfile_serialization=False)
    outer = pickle.dumps(Trap(torch.storage._load_from_bytes, inner.getvalue()))
    with pytest.raises(pickle.UnpicklingError):
        safe_unpickle(io.BytesIO(outer))
    assert not mark.exists()


def test_a_torch_file_that_runs_code_is_refused_by_name(tmp_path):
    mark = tmp_path / "ran"
    path = tmp_path / "w.pth"
    torch.save({"model": {"w": Trap(os.mkdir, str(mark))}}, path)
    with pytest.raises(UserError, match=r"refused to load .*w\.pth: it holds \w+\.mkdir"):
        W.read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [np.zeros(3), np.float32(1)])
def test_numpy_in_a_torch_file_is_refused_with_the_way_out(tmp_path, content):
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": content}}, path)
    with pytest.raises(UserError, match=r"refused .*w\.pth: .* numpy arrays .*torch\.as_tensor"):
        W.read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [np.array(["text"]), np.array([object]), np.zeros(2, "f4,i4"), slice(1), print]
)
def test_what_is_no_number_is_refused(content):
    with pytest.raises(RefusedContent):
        safe_unpickle(io.BytesIO(pickle.dumps(content)))


def test_a_crafted_dtype_state_has_no_effect():
    """numpy's own unpickling lets a file set a dtype's flags and so read bytes as pointers."""
    data = pickle.dumps(np.arange(2, dtype="i8"), protocol=2)
    data = data.replace(b"i8", b"O8")
    with pytest.raises(RefusedContent, match="dtype 'O8'"):
        safe_unpickle(io.BytesIO(data))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_truncated_files_are_one_clear_line(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    W.write_checkpoint(WEIGHTS, path)
    whole = path.read_bytes()
    for share in (0.02, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=str(path)) as caught:
            W.read_checkpoint(path)
        assert "\n" not in str(caught.value)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x04", b"PK\x03\x04", b"\x80\x05}"]))
@settings(deadline=None, max_examples=200)
def test_no_content_gets_past_the_error_message(tmp_path_factory, data, head):
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "w.pkl"
    path.write_bytes(head + data)
    with pytest.raises(UserError):
        W.read_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path):
    def message(name: str, content: bytes | None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            W.read_checkpoint(path)
        return str(caught.value)

    assert "no checkpoint file" in message("missing.pth", None)
    assert "is empty" in message("empty.safetensors", b"")
    assert "is no checkpoint" in message("photo.png", b"\x89PNG\r\n\x1a\n" + bytes(20))
    assert "holds no weights" in message("list.pkl", pickle.dumps([1, 2]))
    assert "holds no weights" in message("none.pkl", pickle.dumps({}))
    assert "'a' is a int" in message("number.pkl", pickle.dumps({"model": {"a": 3}}))
    huge_header = struct.pack("<Q", 2**40) + json.dumps({}).encode()
    assert "is it complete?" in message("huge.safetensors", huge_header)
    with pytest.raises(UserError, match="no checkpoint file"):
        W.read_checkpoint(tmp_path)  # a folder


def test_a_url_that_cannot_be_fetched_is_one_clear_line():
    url = "http://127.0.0.1:9/model.pkl"  # the discard port: nothing listens there
    with pytest.raises(UserError, match=f"cannot fetch checkpoint {url}"):
        W.read_checkpoint(url)


def test_shared_strided_and_low_precision_tensors_are_written(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "a": base,
        "view": base[0],
        "t": base.t(),
        "b": base.bfloat16(),
        "n": torch.tensor(3),
    }
    W.save_safetensors(tensors, tmp_path / "w.safetensors")
    assert same(W.read_checkpoint(tmp_path / "w.safetensors"), tensors)
    W.write_checkpoint(tensors, tmp_path / "w.pkl")
    read = W.read_checkpoint(tmp_path / "w.pkl")
    assert read["b"].dtype == torch.float32
    torch.testing.assert_close(read["b"], tensors["b"].float(), rtol=0, atol=0)


def test_writing_says_what_it_cannot(tmp_path):
    with pytest.raises(UserError, match=r"extension must be \.safetensors, \.pth or \.pkl"):
        W.write_checkpoint(WEIGHTS, tmp_path / "w.onnx")
    with pytest.raises(UserError, match="cannot write"):
        W.write_checkpoint(WEIGHTS, tmp_path / "no folder" / "w.pth")
    with pytest.raises(UserError, match="name it"):
        W.save_safetensors(WEIGHTS, tmp_path / "w.pth")
    assert os.listdir(tmp_path) == []


# ---- hash


def test_hash_changes_with_every_part_and_with_nothing_else():
    first = W.weights_hash(WEIGHTS)
    assert len(first) == 64
    assert first == W.weights_hash(dict(reversed(WEIGHTS.items())))
    assert first == W.weights_hash({k: v.clone() for k, v in WEIGHTS.items()})
    module = nn.BatchNorm2d(3)
    assert W.weights_hash(module) == W.weights_hash(module.state_dict())
    a = torch.tensor([1.0, 2.0])
    variants = [{"a": a}, {"b": a}, {"a": a[None]}, {"a": a.double()}, {"a": a.view(torch.int32)}]
    variants += [{"a": torch.tensor([1.0, 2.0000002])}, {"a": torch.tensor([2.0, 1.0])}, {}]
    assert len({W.weights_hash(v) for v in variants}) == len(variants)
    strided = torch.stack([a, a], 1)[:, 0]
    assert W.weights_hash({"a": strided}) == W.weights_hash({"a": a})


def test_hash_of_other_dtypes():
    """Written out by hand: SHA-256 of the JSON line and the raw little-endian values."""
    expected = hashlib.sha256(b'["a", "torch.float16", [2]]' + np.float16([1, 2]).tobytes())
    assert W.weights_hash({"a": torch.tensor([1, 2]).half()}) == expected.hexdigest()
    for dtype in (torch.bfloat16, torch.bool, torch.int64):
        W.weights_hash({"scalar": torch.ones((), dtype=dtype), "none": torch.ones(0, dtype=dtype)})


def test_a_flipped_bit_is_no_other_weight(tmp_path):
    """torch.load does not look at the checksums that torch.save writes."""
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.arange(1000.0)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["model"]["a"][500] != 500
    with pytest.raises(UserError, match=r"checksum of .* is another.*is it complete"):
        W.read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_a_disk_that_is_full_is_said_and_keeps_the_old_file(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    W.write_checkpoint(WEIGHTS, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk, half way
    try:
        with pytest.raises(UserError, match=f"cannot write {path}: ") as error:
            W.write_checkpoint({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
