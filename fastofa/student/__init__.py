"""The student: a timm model with an exit at each of its four stages."""

from typing import TYPE_CHECKING

from fastofa.system.lazy import lazy

if TYPE_CHECKING:
    from fastofa.student.model import Student as Student

__getattr__, __dir__ = lazy(__name__, {"Student": "fastofa.student.model"})
