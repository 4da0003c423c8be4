"""Parts of checkpoints: renamed, chosen, with what fits; and the report of what did not."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import graphflow as gf
from graphflow.compiler.plan.errors import CheckpointError, UseError
from graphflow.runtime.loading import Loaded, renamed
from graphflow.runtime.store import Store


def net(seed: int, **shapes: tuple[int, ...]) -> Store:
    """A Store with an entry for each keyword, "__" for a dot, of random numbers."""
    store = Store(seed)
    for name, shape in shapes.items():
        store.declare(name.replace("__", "."), "parameter", "float32", shape,
                      lambda generator, shape, dtype: generator.normal(size=shape))
    return store


def arrays(store: Store) -> dict[str, np.ndarray]:
    return {name: store[name] for name in store}


def saved(tmp_path: Path, store: Store) -> Path:
    store.save(tmp_path / "net", "cafe")
    return tmp_path / "net"


OLD: dict[str, tuple[int, ...]] = {"encoder__a__W": (2, 3), "encoder__a__b": (3,), "encoder__b__W": (3, 4),
                                   "head__W": (4, 10), "head__b": (10,)}
NEW: dict[str, tuple[int, ...]] = {"body__a__W": (2, 3), "body__a__b": (3,), "body__b__W": (3, 4),
                                   "head__W": (4, 2), "head__b": (2,), "more": (5,)}


def test_what_fits_is_loaded_and_the_rest_reported(tmp_path: Path) -> None:
    old, new = net(1, **OLD), net(2, **NEW)
    before = arrays(new)
    report = new.load(saved(tmp_path, old), rename={"encoder": "body"}, strict=False)
    assert isinstance(report, Loaded) and report.metadata["plan"] == "cafe"
    assert report.loaded == ["rng.seed", "rng.step", "body.a.W", "body.a.b", "body.b.W"]
    assert report.missing == ["more"] and report.unexpected == []
    assert report.mismatched == {"head.W": "float32[4, 10] in the file, float32[4, 2] here",
                                 "head.b": "float32[10] in the file, float32[2] here"}
    assert str(report) == ("5 loaded, 1 missing, 0 unexpected, 2 mismatched\n  more is missing\n"
                           "  head.W is float32[4, 10] in the file, float32[4, 2] here\n"
                           "  head.b is float32[10] in the file, float32[2] here")
    for name in new:
        source = old if name in report.loaded else before
        np.testing.assert_array_equal(new[name], source[name.replace("body", "encoder")])


@pytest.mark.parametrize("rename", [
    {"encoder": "body", "head": None}, {"encoder.a": "body.a", "encoder.b.W": "body.b.W", "head": None},
    {"encoder": "wrong", "encoder.a": "body.a", "encoder.b": "body.b", "head": None},
    lambda name: name.replace("encoder", "body") if "head" not in name else None])
@pytest.mark.parametrize("only", ["body.*", ["body.a.?", "body.b.*"], lambda name: name.startswith("body")])
def test_a_chosen_part_must_fit_whole(tmp_path: Path, rename: Any, only: Any) -> None:
    old, new = net(1, **OLD), net(2, **NEW)
    before = arrays(new)
    report = new.load(saved(tmp_path, old), rename=rename, only=only)
    assert report.loaded == ["body.a.W", "body.a.b", "body.b.W"] and not report.faults()
    for name in before:
        source = old if name.startswith("body") else before
        np.testing.assert_array_equal(new[name], source[name.replace("body", "encoder")])


@pytest.mark.parametrize("options, message", [
    ({}, "another net:\n  body.a.W is missing"),
    ({"only": "head*"},
     r"another net:\n  head.W is float32\[4, 10\] in the file, float32\[4, 2\] here\n  head.b"),
    ({"only": ["more", "rng.*"]}, "another net:\n  more is missing\nhint"),
    ({"only": ["enc*", "rng.*"]}, "another net:\n  encoder.a.W is not of this net"),
    ({"only": "nothing"}, "nothing in .*net fits this net"),
    ({"only": "body*", "strict": False}, "nothing in .* fits this net:\n  body.a.W is missing"),
    ({"rename": lambda name: "x"}, "encoder.a.W and encoder.a.b are both renamed to x"),
    ({"rename": {"encoder.a": "head"}}, "encoder.a.W and head.W are both renamed to head.W")])
def test_a_part_that_does_not_fit_changes_nothing(
        tmp_path: Path, options: dict[str, Any], message: str) -> None:
    new = net(2, **NEW)
    before = arrays(new)
    with pytest.raises(CheckpointError, match=message):
        new.load(saved(tmp_path, net(1, **OLD)), **options)
    for name, value in before.items():
        np.testing.assert_array_equal(new[name], value)


def test_names_are_renamed_by_whole_parts() -> None:
    tensors = {name: np.zeros(1) for name in ("a/b.W", "ab.W", "a.W", "a/c.W", "a")}
    found = renamed(tensors, {"a": "x/y", "a/c": "z"})
    assert list(found) == ["x/y/b.W", "ab.W", "x/y.W", "z.W", "x/y"]


def test_long_reports_are_shortened(tmp_path: Path) -> None:
    many = net(1, **{f"p{i}": (1,) for i in range(40)})
    report = net(2).load(saved(tmp_path, many), strict=False)
    assert len(report.unexpected) == 40 and str(report).endswith("is not of this net\n  and 28 more")


def test_files_of_other_programs_are_loaded_without_strict(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    theirs = {"layer.weight": np.arange(6.0).reshape(2, 3), "layer.bias": np.array([1, 2, 3], np.int32)}
    save_file(theirs, path)
    store = net(1, w=(2, 3), b=(3,))
    with pytest.raises(CheckpointError, match="checkpoint format 'unknown'"):
        store.load(path, rename={"layer.weight": "w"})
    report = store.load(path, rename={"layer.weight": "w", "layer.bias": "b"}, only=["w", "b"], strict=False)
    np.testing.assert_array_equal(store["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert report.loaded == ["w"] and report.mismatched == {"b": "int32[3] in the file, float32[3] here"}
    save_file({"w": np.zeros((2, 3))}, path, {"format": "9"})
    with pytest.raises(CheckpointError, match="format '9'"):
        store.load(path, strict=False)


def test_extra_tensors_are_no_entries(tmp_path: Path) -> None:
    store = net(1, w=(2,))
    store.save(tmp_path / "a", extra={"more": np.arange(4)}, notes={"state": "x"})
    report = net(2, w=(2,)).load(tmp_path / "a")
    assert report.metadata["state"] == "x" and list(report.extra) == ["more"]
    np.testing.assert_array_equal(report.extra["more"], np.arange(4))
    with pytest.raises(UseError, match="the Store has an entry 'w'"):
        store.save(tmp_path / "a", extra={"w": np.zeros(2)})


def classifier(classes: int, device: str = "reference") -> gf.Model:
    n = gf.dim("N")
    x, y = gf.input("x", (n, 6)), gf.input("y", (n,), "int64")
    with gf.scope("body"):
        h = gf.nn.dense(gf.nn.dense(x, 5, gf.tanh), 4, gf.tanh)
    logits = gf.nn.dense(h, classes, name="head")
    return gf.Model([x], logits, gf.loss.softmax_cross_entropy(logits, y), targets=y, device=device,
                    optimizer=gf.optim.Adam(0.01))


@pytest.mark.parametrize("load", [
    lambda model, path: model.load(path, only=model.store.names("parameter"), strict=False),
    lambda model, path: model.load(path, only="body/*.[Wb]")])
def test_a_trained_body_under_a_new_head(tmp_path: Path, load: Callable[[gf.Model, Path], Loaded]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    trained, fresh = classifier(3), classifier(7)
    trained.fit((x, y), 2)
    trained.save(tmp_path / "a")
    report = load(fresh, tmp_path / "a")
    assert report.loaded == ["body/dense.W", "body/dense.b", "body/dense_1.W", "body/dense_1.b"]
    assert fresh.epoch == 0 and not fresh.store["body/dense.W.mean"].any()
    for name in report.loaded:
        np.testing.assert_array_equal(fresh.store[name], trained.store[name])
    fresh.fit((x, y), 1)
