"""Wrong calls: the error of each, its exact text, and that nothing has changed after the call.

A row of the tables in tests/support/bad_calls is source code, as a user would type it. `setup` runs first; then every
name is written down to the bit, `call` has to raise, and every name has to be as it was.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bad_calls import ROOMS, TABLE
from support.bad_calls.commands import run
from support.bad_calls.functions import Frame
from support.bad_calls.texts import Bad
from support.bits import bits
from support.libraries import need

import arraybn
from arraybn import functional, network
from arraybn.layers import _BatchNorm, _NormBase


def namespace(row: Bad) -> dict[str, Any]:
    """Return the names that the rows may use."""
    x = np.asarray([[1, 2, 3], [3, 5, 1], [0, 1, 2], [7, 1, 1]], "f4")
    frozen = x.copy()
    frozen.flags.writeable = False
    names = {name: getattr(arraybn, name) for name in arraybn.__all__}
    names |= {"arraybn": arraybn, "network": network, "np": np, "Path": Path, "run": run, "Frame": Frame}
    names |= {"_BatchNorm": _BatchNorm, "_NormBase": _NormBase, "RNG": np.random.default_rng(0)}
    names |= {"X": x, "DY": x[::-1].copy(), "W": np.asarray([1, 2, 3], "f4"), "L": np.asarray([0, 2, 1, 0])}
    names |= {"F": frozen, "OUT": np.full((4, 3), 7, "f4"), "LONG": np.ones(12, "f4"), "M": arraybn.moments(x)}
    if row.needs:
        library = need(row.needs)
        names[{"array_api_strict": "strict"}.get(row.needs, row.needs)] = library
        if row.needs == "jax":
            need("jax.numpy")
    return names


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.setup[-30:]} | {row.call}"[-70:])
def test_a_wrong_call_has_this_error_and_changes_nothing(
    row: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = namespace(row)
    exec(row.setup, names)
    before = {name: bits(value) for name, value in names.items() if name != "__builtins__"}
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for known in (False, True):  # calls alike have passed the checks before: their plans must not let this one pass
        make_plans(names) if known else forget_plans()
        with pytest.raises(row.error) as caught:
            exec(row.call, names)
        text = caught.value.args[0] if isinstance(caught.value, KeyError) else str(caught.value)
        if row.pattern:
            assert re.fullmatch(row.text, text)
        else:
            assert text == row.text
            if row.error is not Exception:
                assert type(caught.value) is row.error
        assert {name: bits(value) for name, value in names.items() if name != "__builtins__"} == before
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def forget_plans() -> None:
    functional._PLANS.clear()


def make_plans(names: dict[str, Any]) -> None:
    """Make right calls on arrays like those of the rows."""
    x, w = names["X"], names["W"]
    for dtype in ("f4", "f8", "f2"):
        for channel_axis in (1, -1):
            for vectors in ((None, None), (w, None), (None, w), (w, w)):
                for fixed in ({}, {"mean": w, "var": w}):
                    arraybn.batch_norm(x.astype(dtype), *vectors, channel_axis=channel_axis, **fixed)
    assert functional._PLANS


# Texts that are kept as users know them, though they do not say "expected … got …".
FIXED_WORDS = [
    # PyTorch's
    r"cannot assign '\w+' to '\w+' \((Parameter|Module) or None expected\)",
    r"cannot assign '\w+' to buffer '\w+' \(array, int or None expected\)",
    r"attribute '\w+' already exists",
    r"(parameter|buffer|module) name can't (be empty string|contain a dot); got .*",
    r"(parameter|buffer|module) name should be a string\. Got \w+",
    r"\w+ is not a Module subclass",
    r"'\w+' object has no attribute '\w+'",
    r"training mode is expected to be boolean; got .*",
    r"(?s)Error\(s\) in loading state_dict for .*",
    r"Expected more than 1 value per channel when training, got input size .*",
    r"\w+ (has no (forward|backward)|does not say which inputs it takes)",
    # the operating system's, and argparse's
    r".*No such file or directory: .*",
    r"python -m arraybn.*: error: (argument [\w-]+: (invalid choice: '\w+' \(|expected one argument)|unrecog).*",
]


def complaints(row: Bad) -> list[str]:
    """Return the faults of the text of a row."""
    text = row.text.replace("\\", "") if row.pattern else row.text
    found = []
    if not re.search(rf"(?<!\w){re.escape(row.name)}(?!\w)", text):
        found.append("does not name the argument")
    if row.remedy not in text:
        found.append("does not say the remedy")
    if not any(re.fullmatch(words, text) for words in FIXED_WORDS):
        if "expected " not in text:
            found.append("does not say what was expected")
        if not re.search(r"(^|\W)got |this is a |net\.npz: expected", text):  # files have only a kind
            found.append("does not say what came")
    if not row.error.__name__.startswith("Command") and re.search(r"0x[0-9a-fA-F]{6}|object at", text):
        found.append("shows an address")
    return found


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.setup[-30:]} | {row.call}"[-70:])
def test_every_text_names_the_argument_what_was_expected_and_what_came(row: Bad) -> None:
    assert complaints(row) == []


def test_the_judge_of_texts_sees_bad_ones() -> None:
    good = Bad("f(x)", ValueError, "x: expected 1; got 2. Pass 1", "x", "Pass 1")
    assert complaints(good) == []
    for text in ("expected 1; got 2. Pass 1", "x: got 2. Pass 1", "x: expected 1. Pass 1", "x: expected 1; got 2"):
        assert len(complaints(good._replace(text=text))) == 1, text
    assert complaints(good._replace(text="operands could not be broadcast"))
    assert complaints(good._replace(text=good.text + " <object at 0x7f0011223344>"))


def test_the_table_is_long_and_has_no_row_twice() -> None:
    assert len({(row.setup, row.call) for row in TABLE}) == len(TABLE)
    everywhere = [row for row in TABLE if not row.needs]
    assert len({row.text for row in everywhere}) >= 150
    assert all(len(room) >= 8 for room in ROOMS)
