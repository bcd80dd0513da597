"""Views: the augmentation of every image, drawn in advance as a table."""

from typing import TYPE_CHECKING

from fastofa.system.lazy import lazy

if TYPE_CHECKING:
    from fastofa.views.draw import draw_views as draw_views
    from fastofa.views.policy import ViewPolicy as ViewPolicy
    from fastofa.views.table import Views as Views
    from fastofa.views.table import center_views as center_views

__getattr__, __dir__ = lazy(
    __name__,
    {
        "ViewPolicy": "fastofa.views.policy",
        "Views": "fastofa.views.table",
        "center_views": "fastofa.views.table",
        "draw_views": "fastofa.views.draw",
    },
)
