"""report.html: one self-contained page about a run; no request leaves it, everything is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from fedipfs.observe.runs import numbers, round_metrics
from fedipfs.observe.summary import duration, loss_last, metric, size
from fedipfs.observe.svg import Series, line_chart

_SOURCES = {"server": "server test", "evaluate": "client test", "train": "training"}
_COUNTS = ("num-examples", "num_examples", "examples")  # sizes, not measures of the model


def render(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], config_yaml: str) -> str:
    """The whole page as text.

    Args:
        summary: the run's summary, as in summary.json; missing entries are left out.
        lines: the lines of metrics.jsonl in order; the page holds up with none.
        config_yaml: the run's config.yaml, shown as it is.
    """
    name = f"{summary.get('experiment') or 'run'} · {summary.get('run_id') or ''}"
    style = files("fedipfs.observe").joinpath("report.css").read_text(encoding="utf-8")
    body = [
        _header(summary),
        _tiles(summary, lines),
        _charts(lines),
        _rounds(lines),
        _failures(lines),
        _identifiers(summary),
        _bytes(summary, lines),
        _privacy(summary),
        f"<section><details><summary><h2>Configuration</h2></summary>"
        f"<pre>{escape(config_yaml)}</pre></details></section>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n<footer>Made by FedIPFS. Every identifier on this page is a CID (IPFS, CIDv1): "
        "the bytes behind it can be checked against it.</footer>\n</main></body></html>\n"
    )


def _header(summary: Mapping[str, Any]) -> str:
    status = str(summary.get("status") or "unfinished")
    facts = [
        f"{key} <b>{escape(str(summary[key]))}</b>"
        for key in ("dataset", "strategy", "engine")
        if summary.get(key)
    ]
    error = summary.get("error")
    problem = f"<p class=problem>{escape(str(error))}</p>" if error else ""
    known = status if status in ("finished", "failed", "interrupted") else "other"
    return (
        f"<header><p class=eyebrow>Federated run</p>"
        f"<h1>{escape(str(summary.get('experiment') or 'run'))} "
        f'<span class="status {known}">{escape(status)}</span></h1>'
        f"<p class=run>{escape(str(summary.get('run_id') or ''))}</p>"
        f"<p class=facts>{' · '.join(facts)}</p>{problem}</header>"
    )


def _tiles(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    moved, seconds = numbers(summary.get("bytes")), numbers(summary.get("seconds"))
    final = numbers(summary.get("metrics"))
    tiles = [(name, metric(value)) for name, value in loss_last(final) if name not in _COUNTS][:4]
    tiles.append(("rounds", str(summary.get("rounds_completed", len(lines)))))
    if "total" in seconds:
        tiles.append(("wall time", duration(seconds["total"])))
    if "flower_per_client_round" in moved:
        tiles.append(("by Flower, client and round", size(moved["flower_per_client_round"])))
    if "store_put" in moved:
        tiles.append(("into the store", size(moved["store_put"])))
    if summary.get("peak_rss_mb"):
        tiles.append(("peak memory", size(float(summary["peak_rss_mb"]) * 1e6)))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles
    )
    return f"<dl class=tiles>{cells}</dl>"


def _charts(lines: Sequence[Mapping[str, Any]]) -> str:
    charts: dict[str, list[Series]] = {}
    for source, label in _SOURCES.items():
        points: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for key, value in numbers(line.get(source)).items():
                if key not in _COUNTS:
                    points.setdefault(_measure(key), []).append((int(line["round"]), value))
        for key, series in points.items():
            charts.setdefault(key, []).append(Series(label, series))
    ordered = sorted(charts, key=lambda key: (key == "loss", list(charts).index(key)))
    traffic = [(int(line["round"]), numbers(line.get("bytes"))) for line in lines]
    drawn = [line_chart(f"c{i}", key, charts[key]) for i, key in enumerate(ordered)]
    times = [(int(line["round"]), numbers(line)["seconds"]) for line in lines if "seconds" in line]
    drawn.append(
        line_chart("time", "seconds", [Series("a round", times)], from_zero=True, show=duration)
    )
    stored = [
        Series(label, [(number, moved[key] / 1e6) for number, moved in traffic if key in moved])
        for key, label in (("store_put", "written"), ("store_get", "read"))
    ]
    drawn.append(line_chart("store", "store, MB", stored, from_zero=True, show="{:.1f}".format))
    figures = "".join(drawn)
    return _section("Round by round", figures and f"<div class=charts>{figures}</div>")


def _measure(key: str) -> str:
    """`train_loss` and `eval_loss` belong in the chart of `loss`."""
    return key.removeprefix("train_").removeprefix("eval_")


def _rounds(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    found = {name: 0.0 for line in lines for name in round_metrics(line) if name not in _COUNTS}
    names = [name for name, _ in loss_last(found)]
    rows = []
    for line in lines:
        shown, clients = round_metrics(line), numbers(line.get("clients"))
        moved = numbers(line.get("bytes"))
        cells = [str(line.get("round", ""))]
        cells += [metric(shown.get(name)) for name in names]
        cells += [f"{clients.get('ok', '?')} of {clients.get('selected', '?')}"]
        cells += [duration(numbers(line).get("seconds"))]
        cells += [size(moved.get(key)) for key in ("store_put", "store_get")]
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        cids = (_cid(line.get(key)) for key in ("model_cid", "record_cid"))
        rows.append(f"<tr>{row}{''.join(f'<td class=left>{cid}</td>' for cid in cids)}</tr>")
    head = ["round", *names, "clients", "time", "store in", "store out"]
    return _table("Rounds", head, rows, left=("model", "record"))


def _failures(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{escape(str(line.get('round', '')))}</td>"
        f"<td class=left>{escape(str(failed.get('client', '?')))}</td>"
        f"<td class='left wrap'>{escape(str(failed.get('reason', '')))}</td></tr>"
        for line in lines
        for failed in (line.get("clients") or {}).get("failed") or []
    ]
    if rows:
        return _table("Clients that failed", ["round"], rows, left=("client", "reason"))
    answered = " Every client of every round answered." if lines else ""
    return _section("Clients that failed", f"<p>None.{answered}</p>")


def _identifiers(summary: Mapping[str, Any]) -> str:
    entries = [
        ("final model", summary.get("final_model_cid"), "what the run yields"),
        ("best model", summary.get("best_model_cid"), f"of round {summary.get('best_round')}"),
        ("last round record", summary.get("head_cid"), "links back through every round"),
    ]
    items = "".join(
        f"<div><dt>{name}<small>{what}</small></dt><dd><code>{escape(str(cid))}</code></dd></div>"
        for name, cid, what in entries
        if cid
    )
    return _section("Content identifiers", items and f"<dl class=cids>{items}</dl>")


def _bytes(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    moved = numbers(summary.get("bytes"))
    entries = [
        ("through Flower, per client and round", moved.get("flower_per_client_round")),
        ("written to the store", moved.get("store_put")),
        ("read from the store, verified", moved.get("store_get")),
    ]
    rows = [
        f"<tr><td class=left>{name}</td><td>{size(count)}</td><td>{count:,.0f}</td></tr>"
        for name, count in entries
        if count is not None
    ]
    if not rows:
        return ""
    head = "<tr><th class=left>path</th><th>size</th><th>bytes</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return _section("Bytes", f'<div class="scroll narrow">{table}</div>')


def _privacy(summary: Mapping[str, Any]) -> str:
    spent = summary.get("privacy")
    if not isinstance(spent, Mapping):
        return ""
    rows = [
        f"<tr><td class=left>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>"
        for key, value in spent.items()
    ]
    return _table("Privacy spent", [], rows, left=("quantity", "value"))


def _table(title: str, head: Sequence[str], rows: Sequence[str], left: Sequence[str] = ()) -> str:
    cells = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    cells += "".join(f"<th scope=col class=left>{escape(name)}</th>" for name in left)
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return _section(title, f"<div class=scroll tabindex=0>{table}</div>")


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{title}</h2>{inner}</section>" if inner else ""


def _cid(value: Any) -> str:
    """The whole CID stands in the page, so that it can be copied; CSS shows its beginning."""
    if not value:
        return ""
    text = escape(str(value), quote=True)
    return f'<code class=cid title="{text}">{text}</code>'
