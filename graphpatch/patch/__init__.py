"""The only code that changes a model."""

from .apply import apply, apply_plan
from .patch import Applied, Patch, patches
from .walk import walk

__all__ = ["apply", "apply_plan", "Patch", "Applied", "patches", "walk"]
