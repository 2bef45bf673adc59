"""Compressed bodies, decoded wherever reads are cut."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.http_client.content_coding import MAX_DECODED_BYTES, CodingError, Decoder, decoder_for, is_identity


def raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "two members": lambda data: gzip.compress(data[:3]) + gzip.compress(data[3:]),
    "padded": lambda data: gzip.compress(data) + b"\0" * 9,
    "zlib": zlib.compress,
    "raw": raw_deflate,
}


@pytest.mark.parametrize("form", FORMS)
@given(data=st.binary(max_size=3000), size=st.integers(1, 700))
def test_a_body_cut_anywhere_is_decoded(form: str, data: bytes, size: int) -> None:
    encoded = FORMS[form](data)
    decoder = Decoder("deflate" if form in ("zlib", "raw") else "gzip")
    pieces = [decoder.decode(encoded[start : start + size]) for start in range(0, len(encoded), size)]
    decoder.finish()
    assert b"".join(pieces) == data


@pytest.mark.parametrize("form", ["gzip", "zlib", "raw"])
def test_a_body_that_is_cut_off_is_an_error(form: str) -> None:
    decoder = Decoder("gzip" if form == "gzip" else "deflate")
    decoder.decode(FORMS[form](b"hello" * 100)[:-9])
    with pytest.raises(CodingError):
        decoder.finish()


def test_a_body_in_another_coding_is_an_error() -> None:
    with pytest.raises(CodingError):
        Decoder("gzip").decode(b"hello there")


def test_a_body_that_decodes_to_too_much_is_an_error() -> None:
    with pytest.raises(CodingError):
        Decoder("gzip").decode(gzip.compress(bytes(MAX_DECODED_BYTES + 1)))


@pytest.mark.parametrize(("coding", "is_known"), [("gzip", True), ("X-GZip ", True), ("deflate", True), ("br", False),
                                                  ("zstd", False), ("gzip, br", False)])  # fmt: skip
def test_codings_of_the_standard_library_are_known(coding: str, is_known: bool) -> None:
    assert (decoder_for(coding) is not None) is is_known


@pytest.mark.parametrize("coding", ["identity", "Identity", " ", ""])
def test_identity_in_any_case_is_no_coding(coding: str) -> None:
    assert is_identity(coding)
