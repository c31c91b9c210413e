"""The tensors of a checkpoint's shards: each found where the index says, or in the single file.

Enters: a checkpoint's folder. Leaves: its tensors by name. Where two shards hold a tensor of one name, the index
decides; the other copy counts for nothing.
"""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shortened
from ..files import reading
from ..files.safetensors import check_downloaded, open_shard
from .foreign import refuse_foreign_files
from .prequantised.stored import CheckpointTensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint.

    Raises:
        CheckpointError: It is missing, a pointer of git's, or not a JSON object.
    """
    try:
        content = reading.read_bytes(path, CheckpointError, "restore the file", folder=path.parent)
        check_downloaded(path, content[:100])
        return reading.read_json(path, CheckpointError, "restore the file", folder=path.parent)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {error.strerror}: a checkpoint needs this file") from error


def find_tensors(folder: Path) -> dict[str, CheckpointTensor]:
    """All tensors of the folder's shards, as the index names them, or of the single file.

    Raises:
        CheckpointError: There are none, a shard is missing or damaged, or the index does not fit the shards.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            refuse_foreign_files(folder)
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}: download the weights")
        shard = open_shard(folder / SINGLE)
        return {name: CheckpointTensor(shard=shard, region=region) for name, region in shard.tensors.items()}
    weight_map = _read_index(folder / INDEX)
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (folder / file).exists()]:
        raise CheckpointError(
            f"{folder / missing[0]}: No such file, one of {len(missing)} of {len(files)} shards that {INDEX} names: "
            "download the weights"
        )
    shards = {file: open_shard(folder / file) for file in files}
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CheckpointError(f"{folder / file}: lacks {name!r}, which the index puts there: download it again")
        tensors[name] = CheckpointTensor(shard=shards[file], region=shards[file].tensors[name])
    for file, shard in shards.items():
        if unlisted := sorted(name for name in shard.tensors if name not in weight_map):
            raise CheckpointError(f"{folder / INDEX}: does not list {unlisted[0]!r} of {file}: restore the index")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor.

    Raises:
        CheckpointError: The file is damaged, or names a shard outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map is no object of file names: restore the file")
    if escaping := sorted(file for file in weight_map.values() if Path(file).name != file or "\0" in file):
        raise CheckpointError(f"{path}: names the shard {shortened(escaping[0])}, expected a plain file name")
    if long := next((name for name in (*weight_map, *weight_map.values()) if len(name) > 250), None):
        raise CheckpointError(f"{path}: holds a name of {len(long)} characters: restore the file")
    return weight_map
