"""Distillation methods: losses between the student's outputs, the teacher's targets and the labels."""

from typing import TYPE_CHECKING

from fastofa.system.lazy import lazy

if TYPE_CHECKING:
    from fastofa.methods.method import Method as Method
    from fastofa.methods.method import Outputs as Outputs
    from fastofa.methods.method import Sizes as Sizes
    from fastofa.methods.targets import Targets as Targets

_PLACES = dict.fromkeys(("Method", "Outputs", "Sizes"), "fastofa.methods.method")
__getattr__, __dir__ = lazy(__name__, {**_PLACES, "Targets": "fastofa.methods.targets"})
