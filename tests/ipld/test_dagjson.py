"""Records as DAG-JSON."""

from __future__ import annotations

import json

from fedipfs.ipld import CID, dagjson


def test_links_and_bytes_have_their_own_form() -> None:
    cid = CID.of(b"x")
    value = {"link": cid, "bytes": b"\x00\x01", "list": [cid, None, True, 1, 0.5], "text": "a"}
    assert json.loads(json.dumps(dagjson.view(value))) == {
        "link": {"/": str(cid)},
        "bytes": {"/": {"bytes": "AAE"}},
        "list": [{"/": str(cid)}, None, True, 1, 0.5],
        "text": "a",
    }
