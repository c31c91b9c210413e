"""Data that travels between the stages, and its JSON: geometry, recipe, weights, engine. Standard library only."""

from .built_engine import Binary, CacheInput, EngineSpec, Profile, TowerEngine
from .folder import SCHEMA, FolderSpec, VisionPart
from .geometry import LayerSpec, ModelSpec, RopeScaling, VisionSpec
from .recipe import Format, Override, Recipe
from .stored_weights import BLOCK, EXPERT, GROUP, PANEL, Weight, WeightFile, slot_bytes
from .types import BITS, CODES, FLOATS, FLOATS_BY_CODE, MODEL_TYPES, TYPES, DType, NumberType, Progress, Stored

__all__ = [
    "BITS",
    "BLOCK",
    "CODES",
    "EXPERT",
    "FLOATS",
    "FLOATS_BY_CODE",
    "GROUP",
    "MODEL_TYPES",
    "PANEL",
    "SCHEMA",
    "TYPES",
    "Binary",
    "CacheInput",
    "DType",
    "EngineSpec",
    "FolderSpec",
    "Format",
    "LayerSpec",
    "ModelSpec",
    "NumberType",
    "Override",
    "Profile",
    "Progress",
    "Recipe",
    "RopeScaling",
    "Stored",
    "TowerEngine",
    "VisionPart",
    "VisionSpec",
    "Weight",
    "WeightFile",
    "slot_bytes",
]
