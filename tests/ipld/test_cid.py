from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.errors import CidError, FormatError
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW, varint

# One CID, its texts by npm multiformats.
V0 = "QmbWqxBEKC3P8tqsKc98xmWNzrzDtRLMiMPL8wBuTGsMnR"
V1 = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"

cids = st.builds(
    CID,
    st.just(1),
    st.one_of(st.sampled_from([RAW, DAG_PB, DAG_CBOR]), st.integers(0, 2**63 - 1)),
    st.binary(min_size=32, max_size=32),
) | st.builds(CID, st.just(0), st.just(DAG_PB), st.binary(min_size=32, max_size=32))


def test_well_known_cids() -> None:
    assert str(CID.of(b"")) == "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
    assert str(CID.of(b"hello world")) == (
        "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    )
    assert str(CID.parse(V0).to_v1()) == V1
    assert str(CID.parse(V0)) == V0 and CID.parse(V0).version == 0


@given(cids)
def test_text_and_bytes_round_trip(cid: CID) -> None:
    assert CID.parse(str(cid)) == cid
    assert CID.decode(cid.bytes) == cid
    assert CID.decode(memoryview(cid.bytes)) == cid
    assert CID.read(b"xx" + cid.bytes + b"yy", 2) == (cid, 2 + len(cid.bytes))


@given(cids)
def test_other_multibases_name_the_same_cid(cid: CID) -> None:
    cid = cid.to_v1()
    number = int.from_bytes(cid.bytes, "big")
    base36 = ""
    while number:
        number, digit = divmod(number, 36)
        base36 = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + base36
    upper = base64.b32encode(cid.bytes).decode().rstrip("=")
    for text in ("k" + base36, "f" + cid.bytes.hex(), "B" + upper, "b" + upper.lower()):
        assert CID.parse(text) == cid


def test_texts_by_another_implementation() -> None:
    for text in (
        "k2jmtxw8rjh1z69c6not3wtdxb0u3urbzhyll1t9jg6ox26dhi5sfi1m",
        "zdj7Wic6KcJAfWz1c9o4M6kq9Lwd5BfbxkVafnrojaaGiSFxM",
        "f01701220c3c4733ec8affd06cf9e9ff50ffc6bcd2ec85a6170004bb709669c31de94391a",
    ):
        assert str(CID.parse(text)) == V1
    with pytest.raises(CidError, match="multibase prefix"):
        CID.parse("z" + V0)


@pytest.mark.parametrize(
    "text",
    ["", "b", "Qm", "hello", V1[:-1], V1 + "a", V1.replace("a", "1"), V0[:-1] + "0", "z" * 100,
     "B" + V1[1:].upper()[:-1] + "i", V1[:-1] + "j", "k" * 5000, "é" * 46, "bé", "Qm" + "é" * 44,
     "bafkqaaa", "f0155", "b" + "A" * 58],
)  # fmt: skip
def test_texts_that_are_no_cid(text: str) -> None:
    with pytest.raises(CidError) as caught:
        CID.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_blanks_are_not_skipped() -> None:
    text = "f" + CID.of(b"").bytes.hex()
    for changed in (text[:3] + " " + text[3:], text + "\n", " " + text, text.upper()):
        with pytest.raises(CidError):
            CID.parse(changed)


def test_other_types_are_refused() -> None:
    for value in (None, 3, b"bafy", ["b"]):
        with pytest.raises(CidError):
            CID.parse(value)  # type: ignore[arg-type]


def test_other_hashes_and_versions_are_refused_by_name() -> None:
    blake = b"\x01\x55\xa0\xe4\x02\x20" + bytes(32)
    with pytest.raises(CidError, match="only sha2-256"):
        CID.decode(blake)
    with pytest.raises(CidError, match="version 2"):
        CID.decode(b"\x02\x55\x12\x20" + bytes(32))
    with pytest.raises(CidError, match="dag-pb only"):
        CID(0, RAW, bytes(32))
    with pytest.raises(CidError, match="32 bytes"):
        CID(1, RAW, bytes(31))
    with pytest.raises(CidError, match="shortest form"):
        CID.decode(b"\x01\xd5\x00\x12\x20" + bytes(32))


@given(st.binary(max_size=60))
def test_any_bytes_give_a_cid_or_an_error(data: bytes) -> None:
    with contextlib.suppress(CidError):
        assert CID.decode(data).bytes == data


@given(st.text(max_size=70) | st.from_regex(r"\A[bBkzfQ][0-9a-zA-Z]{0,90}\Z"))
def test_any_text_gives_a_cid_or_an_error(text: str) -> None:
    with contextlib.suppress(CidError):
        assert CID.parse(text) == CID.parse(str(CID.parse(text)))


@given(cids, st.data())
def test_no_changed_byte_goes_unnoticed(cid: CID, data: st.DataObject) -> None:
    raw = bytearray(cid.bytes)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CidError):
        assert CID.decode(bytes(raw)) != cid


def test_identity_order_and_hash() -> None:
    a, b = CID.of(b"a"), CID.of(b"b")
    assert a == CID.parse(str(a)) and hash(a) == hash(CID.parse(str(a))) and a != b
    assert sorted([b, a, b]) == sorted([a, b, b])
    assert len({a, b, CID.of(b"a")}) == 2 and repr(a) == f"CID({a})"
    assert a != CID.of(b"a", DAG_CBOR)
    with pytest.raises(AttributeError):
        a.codec = 3  # type: ignore[misc]
    assert a.matches(bytearray(b"a")) and not a.matches(b"b")
    assert CID.of(memoryview(b"a")).digest == hashlib.sha256(b"a").digest()


@given(st.integers(0, varint.MAX))
def test_varints_round_trip(value: int) -> None:
    encoded = varint.encode(value)
    assert varint.decode(encoded, 0, CidError) == (value, len(encoded))
    with pytest.raises(CidError, match="cut short"):
        varint.decode(encoded[:-1], 0, CidError)


def test_varints_out_of_range() -> None:
    for value in (-1, varint.MAX + 1):
        with pytest.raises(FormatError):
            varint.encode(value)
    with pytest.raises(CidError, match="longer than 9"):
        varint.decode(b"\xff" * 9 + b"\x01", 0, CidError)
