"""Wrong calls, by subject. The errors and what tests/test_bad_input.py requires of each row are in that file."""

from __future__ import annotations

from . import checks, commands, functions, layers, modules, ranks, states

ROOMS = (
    functions.FUNCTIONS,
    functions.BACKWARD,
    layers.CONSTRUCTORS,
    layers.LAYERS,
    states.STATE_DICTS,
    modules.MODULES,
    modules.NETWORK,
    states.FILES,
    commands.COMMANDS,
    checks.CHECKS,
    ranks.SYNC,
)
TABLE = [row for room in ROOMS for row in room]
