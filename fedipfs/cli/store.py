"""`fedipfs store`: look into, fill and tend a block store."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from fedipfs.cli.base import Commands, json_option, print_json
from fedipfs.cli.blocks import (
    DEFAULT,
    complete_store,
    counted,
    folder_of,
    name_of,
    open_blocks,
    place,
)
from fedipfs.errors import StoreError

if TYPE_CHECKING:
    from fedipfs.ipld import CID
    from fedipfs.store import Store


@click.group("store", cls=Commands)
def commands() -> None:
    """Look into, fill and tend a block store.

    The store is --store SPEC, else $FEDIPFS_STORE, else runs/store. SPEC is a folder's path, or
    kubo:ADDRESS, gateway:URL,URL, cached:PATH (a folder before the node at the default address),
    or a mapping as JSON with `kind` and that store's options; it comes after the command's name.
    FILE may be - for standard input; that of `export`, for standard output.
    """


class CidType(click.ParamType):
    """A CID; anything else is a usage error that names it."""

    name = "cid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> CID:
        """The CID that `value` is the text of."""
        from fedipfs.errors import CidError
        from fedipfs.ipld import CID

        try:
            return CID.parse(value)
        except CidError as error:
            self.fail(str(error), param, ctx)


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The --store option; the command gets it as `spec`."""
    return click.option(
        "--store",
        "spec",
        envvar="FEDIPFS_STORE",
        default=DEFAULT,
        show_default=True,
        metavar="SPEC",
        shell_complete=complete_store,
        help="The store.",
    )(command)


def cid_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """One CID."""
    return click.argument("cid", type=CidType())(command)


weights_option = click.option(
    "--weights", is_flag=True, help="Cut a safetensors FILE at its tensors, as runs do."
)
files_argument = click.argument("files", nargs=-1, required=True, metavar="FILE...")


@contextmanager
def _source(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
    else:
        with open(name, "rb") as file:
            yield file


@contextmanager
def _target(name: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all, or standard output."""
    from fedipfs.store.files import os_errors

    if name == "-":
        yield sys.stdout.buffer
        return
    file = Path(name)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os_errors(name):
            with temporary.open("wb") as stream:
                yield stream
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@commands.command()
@files_argument
@weights_option
@store_option
def add(files: tuple[str, ...], weights: bool, spec: str) -> None:
    """Store each FILE, pin it, and print its CID."""
    from fedipfs.store import dag

    blocks = open_blocks(spec, create=True)
    for name in files:
        with (
            _source(name) as stream,
            counted(f"add {Path(name).name}", blocks, "put_bytes", _bytes_of(stream)),
        ):
            cid = dag.add(blocks, _chunks(stream, weights))
            blocks.publish()
        blocks.pin(cid, _pin_name(name))
        blocks.flush()
        _print_cid(cid, name, files)


def _pin_name(file: str) -> str:
    return "stdin" if file == "-" else Path(file).name


def _bytes_of(stream: BinaryIO) -> int | None:
    """A file's size; None for a pipe."""
    return os.fstat(stream.fileno()).st_size if stream.seekable() else None


@commands.command()
@files_argument
@weights_option
def cid(files: tuple[str, ...], weights: bool) -> None:
    """Print the CID of each FILE and store nothing.

    It is the one that IPFS gives with the profile unixfs-v1-2025; a run's model has the one that
    --weights gives.
    """
    from fedipfs.ipld import CID, unixfs

    for name in files:
        with _source(name) as stream:
            root = unixfs.build(_chunks(stream, weights), CID.of, threads=2)
            _print_cid(root, name, files)


def _chunks(stream: BinaryIO, weights: bool) -> Iterator[Any]:
    from fedipfs.ipld import unixfs

    if not weights:
        return unixfs.chunk(stream)
    if not stream.seekable():
        raise click.UsageError("--weights needs a file, not a pipe")
    from fedipfs.weights import file_chunks

    return file_chunks(stream)


def _print_cid(cid: CID, name: str, files: tuple[str, ...]) -> None:
    click.echo(f"{cid}  {name}" if len(files) > 1 else str(cid))


@commands.command()
@cid_argument
@click.option(
    "--identity",
    envvar="FEDIPFS_IDENTITY",
    type=click.Path(path_type=Path),
    help="The key file that opens what is sealed.",
)
@click.option("--raw", is_flag=True, help="Write the bytes as they are stored, sealed or not.")
@store_option
def cat(cid: CID, identity: Path | None, raw: bool, spec: str) -> None:
    """Write the file behind a CID to standard output, every byte checked.

    A record is written as JSON, its links as {"/": "CID"}. What is sealed is opened with the key
    file of --identity or $FEDIPFS_IDENTITY; runs/RUN/keys/coordinator.key opens what a run sealed.
    """
    from fedipfs.cli.sealed import opened
    from fedipfs.ipld import DAG_CBOR, dagjson, unixfs
    from fedipfs.store import dag

    blocks = open_blocks(spec)
    if cid.codec == DAG_CBOR:
        if raw:
            sys.stdout.buffer.write(blocks.get(cid))
        else:
            print_json(dagjson.view(dag.get_record(blocks, cid)))
        return
    total = unixfs.size(cid, blocks.get)
    with counted("fetch", blocks, "fetched_bytes", total):
        blocks.fetch(cid)
    pieces = dag.cat(blocks, cid)
    if not raw:
        pieces, record = opened(cid, pieces, identity)
        if record is not None:
            print_json(dagjson.view(record))
            return
    # On a terminal the bar and the content would be drawn over each other.
    with counted("read", blocks, "get_bytes", 0 if sys.stdout.isatty() else total):
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@commands.command()
@store_option
@json_option
def stat(spec: str, as_json: bool) -> None:
    """Count blocks, bytes and pins: a folder's, or a node's as it counts them."""
    from fedipfs.observe.summary import align, size

    blocks = open_blocks(spec)
    if not hasattr(blocks, "stat"):
        raise StoreError(f"{name_of(blocks)}: a gateway does not say what it holds; ask its node")
    found = blocks.stat()
    values = {"blocks": found.blocks, "bytes": found.bytes, "pins": found.pins}
    if as_json:
        print_json({**place(blocks), **values})
        return
    rows = [("store", name_of(blocks)), ("blocks", str(found.blocks))]
    rows += [("bytes", f"{found.bytes} ({size(found.bytes)})"), ("pins", str(found.pins))]
    click.echo("\n".join(align(rows)))


@commands.command()
@click.argument("cid", type=CidType(), required=False)
@click.option("--pins", is_flag=True, help="List the pinned roots, a line a name.")
@store_option
@json_option
def ls(cid: CID | None, pins: bool, spec: str, as_json: bool) -> None:
    """List a folder's blocks with their sizes in bytes, or what a CID links to."""
    if cid is not None and pins:
        raise click.UsageError("give a CID or --pins, not both")
    from fedipfs.observe.summary import align

    blocks = open_blocks(spec)
    key = "name" if pins else "size"
    rows: list[tuple[CID, str | int | None]]
    if pins:
        rows = [(root, name) for root, names in sorted(blocks.pins().items()) for name in names]
    elif cid is not None:
        from fedipfs.ipld import links

        rows = [(link, _size(blocks, link)) for link in links(cid, blocks.get(cid))]
    elif (folder := folder_of(blocks)) is None:
        raise StoreError(
            f"{name_of(blocks)}: only a folder's blocks can be listed; use `ipfs refs local` on "
            "the node, or ls CID, or ls --pins"
        )
    else:
        rows = [(block, folder.size(block)) for block in sorted(folder)]
    if as_json:
        print_json([{"cid": str(item), key: value} for item, value in rows])
    elif rows:
        missing = "not in this store"
        texts = [(str(item), missing if value is None else str(value)) for item, value in rows]
        click.echo("\n".join(align(texts)))


def _size(blocks: Store, link: CID) -> int | None:
    """Bytes of the file behind a link, of the block for a record, None for what is not there."""
    from fedipfs.errors import BlockNotFound
    from fedipfs.ipld import DAG_CBOR, unixfs

    if not blocks.has(link):  # a node would look for it elsewhere, and for long
        return None
    try:
        return blocks.size(link) if link.codec == DAG_CBOR else unixfs.size(link, blocks.get)
    except BlockNotFound:
        return None


@commands.command()
@cid_argument
@click.option("--name", default="", help="What the pin is for.")
@store_option
def pin(cid: CID, name: str, spec: str) -> None:
    """Keep a CID and everything it links to from `gc`, under one more name."""
    blocks = open_blocks(spec)
    blocks.pin(cid, name)
    blocks.flush()


@commands.command()
@cid_argument
@click.option("--name", help="Take only this name away.")
@store_option
def unpin(cid: CID, name: str | None, spec: str) -> None:
    """Let `gc` remove a CID that was pinned, once it has no name left."""
    blocks = open_blocks(spec)
    pinned = blocks.pins()
    root = cid if cid in pinned else cid.to_v1()
    names = pinned.get(root, ())
    if not names or (name is not None and name not in names):
        named = "" if name is None else f" as {name!r}"
        raise StoreError(
            f"{cid} is not pinned{named} in {name_of(blocks)}: see 'fedipfs store ls --pins'"
        )
    blocks.unpin(root, name)
    blocks.flush()


@commands.command()
@click.option(
    "--grace",
    "grace_s",
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="Keep a folder's blocks, and uploads to a node, that are younger than this.",
)
@store_option
def gc(grace_s: float, spec: str) -> None:
    """Remove the blocks that no pin leads to; name on standard error those missing below one.

    A node is told to collect its own garbage, everybody's: what others put there and did not pin
    goes, too.
    """
    from fedipfs.ipld import RAW
    from fedipfs.observe.summary import size

    blocks = open_blocks(spec)
    if not hasattr(blocks, "gc"):
        raise StoreError(f"{name_of(blocks)}: gateways only give; collect garbage on their nodes")
    report = blocks.gc(grace_s)
    for missing in report.missing if report.complete else ():
        click.echo(f"{missing} is missing below a pin: import or add it again", err=True)
    unknown = next((cid for cid in report.missing if cid.codec != RAW), None)
    if not report.complete and unknown is not None:
        raise StoreError(
            f"nothing was removed: what {unknown} links to is unknown, as it is missing "
            f"or damaged in {name_of(blocks)}; import it again, or unpin what leads to it"
        )
    click.echo(f"removed {report.removed} blocks ({size(report.removed_bytes)})")
    if not report.complete:
        raise StoreError(
            f"{name_of(blocks)}: the node reports errors, and some garbage is left; see its log"
        )


@commands.command()
@store_option
def verify(spec: str) -> None:
    """Read and check every block of a folder; list the damaged ones and exit with 2 if any is."""
    blocks = open_blocks(spec)
    folder = folder_of(blocks)
    if folder is None:
        raise StoreError(
            f"{name_of(blocks)}: every block is checked when it is read; to check all that a node "
            "holds, run `ipfs repo verify` there"
        )
    report = folder.verify()
    for damaged in report.damaged:
        click.echo(str(damaged))
    if report.damaged:
        raise StoreError(
            f"{len(report.damaged)} of {report.blocks} blocks in {folder.path} are damaged: delete "
            "their files and add or import what they belong to again"
        )
    click.echo(f"{report.blocks} blocks, all whole")


@commands.command()
@cid_argument
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@store_option
def export(cid: CID, file: str, force: bool, spec: str) -> None:
    """Write a CID and everything it links to into a CAR FILE, sealed content as it is stored.

    Every block has to be there: what `gc` has removed of a run cannot be exported with its head.
    """
    from fedipfs.ipld import DAG_CBOR, unixfs
    from fedipfs.store import dag

    if file != "-" and Path(file).exists() and not force:
        raise click.UsageError(f"{file} exists: choose another name, or add --force")
    blocks = open_blocks(spec)
    total = None if cid.codec == DAG_CBOR else unixfs.size(cid, blocks.get)
    with counted("fetch", blocks, "fetched_bytes", total):
        blocks.fetch(cid)
    with _target(file) as out, counted(f"export {Path(file).name}", blocks, "get_bytes", total):
        dag.export_car(blocks, [cid], out)


@commands.command(name="import")
@click.argument("file", type=click.Path(allow_dash=True))
@store_option
def import_(file: str, spec: str) -> None:
    """Store the blocks of a CAR FILE, each checked; pin its roots and print their CIDs."""
    from fedipfs.store import dag

    blocks = open_blocks(spec, create=True)
    with (
        _source(file) as stream,
        counted(f"import {Path(file).name}", blocks, "put_bytes", _bytes_of(stream)),
    ):
        roots = dag.import_car(blocks, stream)
        blocks.publish()
    for root in roots:
        blocks.pin(root, _pin_name(file))
    blocks.flush()
    for root in roots:
        click.echo(str(root))
