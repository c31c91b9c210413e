"""From a model to what one target needs: a lowered graph or an engine, in a bundle."""

from ..errors import needing

with needing("export"):
    from .bundle import build_bundle
    from .tensorrt_bundle import Options

__all__ = ["Options", "build_bundle"]
