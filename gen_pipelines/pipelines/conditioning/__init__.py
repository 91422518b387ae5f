"""What a picture is to be, as the denoisers of each family are told it: captions through their text encoders, and the picture's size."""

from .captions import Captions
from .encoding import TextEncoding, text_encoding
from .picture_size import PictureSize

__all__ = ["Captions", "PictureSize", "TextEncoding", "text_encoding"]
