"""Images of messages, from a request or from a host that is allowed.

Enters: a message's part. Leaves: the image, as a session takes it. Invariant: what is asked to be seen in little detail
takes one tile, whose tokens are as few as an image can have.
"""

from collections.abc import Collection
from typing import Any

from PIL import Image

from ..runtime.images.data_urls import read_data_url
from ..runtime.images.sources import read_image
from .protocol.chat import ImageAddress
from .remote_images import fetch_image


def message_image(address: ImageAddress, where: str, hosts: Collection[str], side: int) -> Any:
    """An image as its file's bytes; of little detail as pixels, no more than a tile has.

    Args:
        address: Its data or its address, and its detail.
        where: The field that it stands in.
        hosts: Hosts that images are fetched from.
        side: A tile's side in pixels; 0 where the model takes no images.

    Raises:
        SessionError: It cannot be read.
        RequestError: It may not be fetched.
    """
    is_inside = address.url[:5].lower() == "data:"
    data = read_data_url(address.url, where) if is_inside else fetch_image(address.url, hosts)
    if address.detail != "low" or not side:
        return data
    image = read_image(data, "the image")
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return image
