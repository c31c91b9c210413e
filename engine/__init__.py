"""From a model to what one target needs: a lowered graph or an engine, in a bundle."""

from ..errors import without_extra

try:
    from .bundle import build_bundle
    from .tensorrt_bundle import Options
except ModuleNotFoundError as error:
    raise without_extra(error, "export") from error

__all__ = ["Options", "build_bundle"]
