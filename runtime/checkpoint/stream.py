"""Write a checkpoint with one of its tensors in memory at a time.

The file is laid out with holes, which the tensors fill as they are hashed. It is laid out again
around them with their digests, which are as long as those they replace. (The zip's CRC-32 of the
tensors stay 0: nothing reads them where there are digests.) What is left of a write that ends early
is no checkpoint.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Size, Tensor

from runtime.checkpoint.format import digest_of, header_digest

# By group and name, what a file holds: "model" first, then "optimizer".
Layout = dict[str, dict[str, tuple[Size, torch.dtype]]]


def stream(file: BinaryIO, header: dict, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write a checkpoint into a new file that has a name and is open for binary writing.

    tensors: all that `layout` describes, in its order; each is asked for when those before it are
    written. Raise ValueError for a tensor of another shape or that is not finite.
    """
    expected = [
        (group, name, *kind) for group, named in layout.items() for name, kind in named.items()
    ]
    digests = {f"{group}/{name}": f"{i:064x}" for i, (group, name, *_) in enumerate(expected)}
    digests["header"] = header_digest(header)
    _lay_out(file, header, layout, digests)
    offsets = _offsets(file)
    for i, ((group, name, shape, dtype), given) in enumerate(zip(expected, tensors, strict=True)):
        if given.shape != shape:
            raise ValueError(f"{name} has the shape {list(given.shape)}, not {list(shape)}")
        tensor = given.detach().to("cpu", dtype).contiguous()
        digests[f"{group}/{name}"], finite = digest_of(tensor)
        if not finite:
            raise ValueError(f"{group} tensor {name} holds NaN or infinity")
        file.seek(offsets[f"archive/data/{i}"])
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    _lay_out(file, header, layout, digests)
    assert _offsets(file) == offsets, "the digests moved the tensors"


def _lay_out(file: BinaryIO, header: dict, layout: Layout, digests: dict[str, str]) -> None:
    """Write all of a checkpoint but its tensors, whose offsets in the file stay what they are."""
    # Here, because it takes a while and predict.py has no use for it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        groups = {
            group: {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in named.items()}
            for group, named in layout.items()
        }
    contents = {"step": header["step"], **groups, **header, "digests": digests}
    file.seek(0)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch_save(contents, file)
    file.flush()


def _offsets(file: BinaryIO) -> dict[str, int]:
    """Return where each record of a zip begins.

    That is after its local header of 30 bytes, its name and an extra field, whose lengths are at
    bytes 26 and 28 of the header.
    """
    offsets = {}
    with open(file.name, "rb") as written:
        for entry in zipfile.ZipFile(written).infolist():
            written.seek(entry.header_offset + 26)
            name_and_extra = sum(struct.unpack("<HH", written.read(4)))
            offsets[entry.filename] = entry.header_offset + 30 + name_and_extra
    return offsets


class _Sink:
    """A file whose first error (disk full, Ctrl-C) is kept.

    torch.save continues to close its zip and reports that failure instead.
    """

    def __init__(self, file):
        self.file = file
        self.error: BaseException | None = None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def seek(self, *where) -> int:
        return self.file.seek(*where)

    def flush(self) -> None:
        if self.error is None:
            self.file.flush()


def torch_save(contents: dict, file: BinaryIO) -> None:
    """Call torch.save; raise the file's own error where it fails."""
    sink = _Sink(file)
    try:
        torch.save(contents, sink)  # type: ignore[arg-type]  # a file as far as torch.save asks
    except RuntimeError:
        if sink.error is not None:
            raise sink.error from None
        raise
