"""A report is whole, escaped, and made of whatever a run left."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from rayalign.errors import ConfigError, DataError
from rayalign.report import figures, write_report
from rayalign.report.data import load_runs

ATTACK = "</script><img src=x onerror=alert(1)>"
METRICS = {
    "loss": 0.7,
    "reward/mean": 0.2,
    "reward/std": 0.1,
    "kl/k1": 1.0,
    "kl/k3": 1.1,
    "lr": 1e-5,
    "time/rollout_s": 2.0,
    "time/update_s": 3.0,
    "time/step_s": 6.0,
    "sync/logp_gap_mean": 0.01,
    "sync/logp_gap_max": 0.02,
    "memory/peak_gib": 8.0,
}
EVALUATED = {"reward": 0.3, "reward/low": 0.2, "reward/high": 0.4, "kl/k1": 1.0, "kl/k1/low": 0.5, "kl/k1/high": 1.5}


def lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def make_run(
    folder: Path, *, steps: int = 4, planned: int = 4, text: str = "fine", change=lambda record: record
) -> Path:
    """A folder as a run leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {planned}}}\noptimizer: {{lr: 1.0e-05}}\nrun_dir: {folder}\n")
    (folder / "versions.json").write_text('{"python": "3.11.7", "torch": "2.13.0"}')
    records = [{"step": step, **METRICS, "loss": 0.7 - step / 100} for step in range(1, steps + 1)]
    lines(folder / "metrics.jsonl", [change(record) for record in records])
    sample = {"prompt_index": 0, "prompt": "A film?", "completion": text, "score": 0.5, "tokens": 3}
    rollout = {"version": 1, "finish_reason": "length"}
    lines(folder / "samples.jsonl", [{"step": step, **sample, **rollout} for step in range(1, steps + 1)])
    ends = [0, steps] if steps else []
    lines(folder / "evaluations.jsonl", [{"step": s, "metrics": EVALUATED, "samples": [sample] * 2} for s in ends])
    return folder


class Page(HTMLParser):
    """The tags of a page, its text outside scripts, and its blocks of JSON."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.blocks, self.levels = [], "", [], []
        self._inside = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("type", tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.levels.append(int(tag[1]))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data):
        if self._inside == "application/json":
            self.blocks.append(json.loads(data))
        elif self._inside is None:
            self.text += data


def test_the_report_of_a_run(tmp_path):
    out = write_report([make_run(tmp_path / "demo")])
    assert out == tmp_path / "demo" / "report.html" and [p.name for p in out.parent.glob("*tmp*")] == []
    page = Page(out)
    for word in ("demo", "4 of 4 steps, finished", "[0.200, 0.400]", "KL (k1)", "2.13.0", "before", "after", "step 4"):
        assert word in page.text, word
    assert f"rayalign train {tmp_path}/demo/config.yaml run_dir={tmp_path}/demo-again" in page.text
    assert "resume=true" not in page.text
    assert len(page.blocks) >= 8


def test_a_run_without_its_last_evaluation_is_not_finished(tmp_path):
    folder = make_run(tmp_path / "demo")
    lines = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluations.jsonl").write_text(lines[0])
    assert "4 of 4 steps; the last evaluation is missing" in Page(write_report([folder])).text


def test_no_network_and_no_script_but_ours(tmp_path):
    page = Page(write_report([make_run(tmp_path / "demo")]))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-inline" not in policy.split(";")[1]
    assert not [a for _, a in page.tags if {"src", "srcset", "data", "action"} & a.keys()]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "img")]
    assert all(a["href"].startswith("#") for _, a in page.tags if "href" in a)


def test_figures_are_what_plotly_takes(tmp_path):
    runs = load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", change=lambda r: {**r, "x/new": 1.0})])
    for some in (runs, runs[:1], runs[1:]):
        panels = [*figures.learning(some), *figures.machine(some), *figures.others(some)]
        assert len({panel.title for panel in panels}) == len(panels) >= 8
        for panel in panels:
            go.Figure(panel.figure)  # raises for a property that plotly does not know
            assert panel.legend and panel.summary
    assert [panel.title for panel in figures.others(runs)] == ["x/new"]


def test_stages_and_the_rest_make_the_step(tmp_path):
    (panel,) = (p for p in figures.machine(load_runs([make_run(tmp_path / "a")])) if p.title == "Time of a step")
    areas = {t["name"]: t["y"] for t in panel.figure["data"] if t["meta"]["role"] == "area"}
    assert areas == {"rollout": [2] * 4, "update": [3] * 4, "other": [1] * 4}


def test_what_a_model_wrote_stays_text(tmp_path):
    wrote = f"{ATTACK} \u2028\u2029 \x00\x1b[31m \ud800 \u202eright to left <b>"
    run = make_run(tmp_path / "<img src=x>" / "x")
    sample = {"prompt": f"prompt {ATTACK}", "completion": wrote, "score": 1.0}
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, **sample}) + "\n")
    (run / "evaluations.jsonl").write_text(
        json.dumps({"step": 0, "metrics": {ATTACK: 1.0}, "samples": [sample]}) + "\n"
    )
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, **METRICS, f"more/{ATTACK}": 1.0, "time/<b>_s": 1}) + "\n"
    )
    (run / "config.yaml").write_text(json.dumps({"model": {"path": ATTACK}, "algorithm": {"name": ATTACK}}))
    (run / "versions.json").write_text(json.dumps({ATTACK: ATTACK}))
    other = make_run(tmp_path / "x")
    page = Page(write_report([run, other], tmp_path / "out.html"))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert page.text.count(ATTACK) >= 8 and "<img src=x>/x" in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == len(page.blocks) + 2
    assert "\x00" not in page.text and "\x1b" not in page.text and "␛[31m" in page.text
    around = [a for tag, a in page.tags if tag in ("p", "span") and a.get("dir") == "auto"]
    assert around
    names = [trace["name"] for block in page.blocks for trace in block["data"]]
    assert any("&lt;img" in name for name in names) and not any("<" in name for name in names)


def test_several_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a"))
    make_run(Path("runs/b"), steps=2)
    Path("runs/b/config.yaml").write_text("train: {steps: 4}\noptimizer: {lr: 2.0e-05}\nrun_dir: runs/b\n")
    out = write_report([Path("runs/a"), Path("runs/b/metrics.jsonl"), Path("runs/a")])
    page = Page(out)
    assert out == Path("report.html")
    assert "2 runs compared" in page.text and "Where the configs differ" in page.text
    rows = page.text.split("Where the configs differ")[1].split("The same run again")[0].split()
    assert [word for word in rows if word.startswith(("optimizer", "1.0e", "2.0e", "train", "run_dir"))] == [
        "optimizer.lr",
        "1.0e-05",
        "2.0e-05",
    ]
    assert "rayalign train runs/b/config.yaml run_dir=runs/b resume=true" in page.text
    stacks = [block for block in page.blocks if any(trace["meta"]["role"] == "area" for trace in block["data"])]
    assert len(stacks) == 2 and stacks[0]["layout"]["yaxis"]["range"] == stacks[1]["layout"]["yaxis"]["range"]
    colors = {
        (t["meta"]["run"], t["meta"]["color"]) for b in page.blocks for t in b["data"] if t["meta"]["role"] == "curve"
    }
    assert colors == {(0, 0), (1, 1)}


def test_headings_are_in_order_and_charts_are_named(tmp_path):
    for runs in ([make_run(tmp_path / "a")], [tmp_path / "a", make_run(tmp_path / "b")]):
        page = Page(write_report(runs, tmp_path / "out.html"))
        assert page.levels[0] == 1 and page.levels.count(1) == 1
        assert all(below <= above + 1 for above, below in zip(page.levels, page.levels[1:], strict=False))
        charts = [a for _, a in page.tags if a.get("role") == "img"]
        assert charts and all(a["aria-label"] for a in charts)
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "config.yaml", "versions.json", "samples.jsonl", "evaluations.jsonl"]
)
def test_a_file_that_is_missing(tmp_path, missing):
    run = make_run(tmp_path / "demo")
    (run / missing).unlink()
    assert "demo" in Page(write_report([run])).text


def test_a_run_without_a_step(tmp_path):
    page = Page(write_report([make_run(tmp_path / "demo", steps=0)]))
    assert "no step yet" in page.text and "No step has been recorded yet" in page.text and page.blocks == []


def test_gaps_skips_and_a_cut_line(tmp_path):
    def change(record):
        step = record["step"]
        if step == 2:
            return {key: value for key, value in record.items() if key != "loss"}
        return {**record, "loss": float("nan")} if step == 3 else {**record, "note": "text", "flag": True}

    run = make_run(tmp_path / "demo", change=change, planned=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    page = Page(write_report([run]))
    (loss,) = (t for b in page.blocks for t in b["data"] if t["name"].startswith("mean over"))
    assert (loss["x"], loss["y"]) == ([1, 3, 4], [0.69, None, 0.66])
    assert "not a finite number at step 3" in page.text
    assert "4 of 9 steps" in page.text and "1 skipped" in page.text and "resume=true" in page.text


def test_steps_that_train_the_critic_alone_are_not_skipped(tmp_path):
    def change(record):
        kept = {key: value for key, value in record.items() if key != "loss"}
        return {1: {**kept, "critic/loss": 0.4}, 2: {**kept, "critic/loss": 0.3}, 3: kept}.get(record["step"], record)

    page = Page(write_report([make_run(tmp_path / "demo", change=change)]))
    assert "2 critic only, 1 skipped: nothing to learn from" in page.text


def test_no_key_and_no_password_is_in_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path("runs/a")), make_run(Path("runs/b"))]
    for run in runs:
        secrets = {
            "model": {"path": f"https://bob:hunter2-{run.name}@host/tiny"},
            "scorer": {"name": "judge", "api_key": f"sk-{run.name}"},
            "trackers": [{"name": "mlflow", "tracking_uri": f"http://bob:hunter2-{run.name}@host:5000"}],
        }
        (run / "config.yaml").write_text(json.dumps(secrets))
    for some in (runs, runs[:1]):
        page = write_report(some, Path("out.html")).read_text()
        assert "hunter2" not in page and "sk-a" not in page and "sk-b" not in page
        assert "api_key: '***'" in Page(Path("out.html")).text


def test_labels_say_what_is_counted(tmp_path):
    page = Page(write_report([make_run(tmp_path / "demo")]))
    assert "median; 24.0 s in steps" in page.text and "in all" not in page.text
    assert page.text.count("host and GPU, peaks of all processes added") == 2


def test_a_mean_is_that_of_all_completions(tmp_path):
    run = make_run(tmp_path / "demo", steps=1)
    written = [{"step": 1, "prompt": "A film?", "completion": f"c{i}", "score": float(i)} for i in range(8)]
    lines(run / "samples.jsonl", written)
    lines(run / "evaluations.jsonl", [{"step": 1, "metrics": {}, "samples": written}])
    page = Page(write_report([run]))
    assert page.text.count("4 of 8, mean of all +3.500") == 2 and "c3" in page.text and "c4" not in page.text


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("runs", "did you mean runs/demo?"),
        ("runs/dem", "did you mean runs/demo?"),
        ("demo", "did you mean runs/demo?"),
        ("runs/demo/checkpoints", "did you mean runs/demo?"),
        ("runs/demo/log/driver.log", "did you mean runs/demo?"),
        ("elsewhere/xyz", "name one of: runs/demo"),
    ],
)
def test_a_path_that_is_no_run(tmp_path, monkeypatch, given, remedy):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/demo"))
    Path("runs/demo/checkpoints").mkdir()
    with pytest.raises(ConfigError) as caught:
        write_report([Path(given)])
    assert caught.value.remedy == remedy and caught.value.exit_code == 2


def test_a_folder_is_a_place_to_write_to(tmp_path):
    assert write_report([make_run(tmp_path / "demo")], tmp_path) == tmp_path / "report.html"


def _damage(name: str, text: bytes):
    def cut(run: Path) -> list[Path]:
        (run / name).write_bytes(text)
        return [run]

    return cut


@pytest.mark.parametrize(
    ("runs", "what"),
    [
        (lambda run: [], "a report needs a run"),
        (lambda run: [run.parent / "nothing"], "there is no such run"),
        (lambda run: [run.parent], "there is no run in this folder"),
        (_damage("metrics.jsonl", b'{"step"\n'), "a record of this run is damaged"),
        (_damage("samples.jsonl", b'{"step": 1}\n\xff\n'), "a record of this run is damaged"),
        (_damage("evaluations.jsonl", b"7\n"), "a record of this run is damaged"),
        (_damage("config.yaml", b"train: {\n"), "this file of a run is damaged"),
        (_damage("versions.json", b"\xff"), "this file of a run is damaged"),
        (lambda run: [run], "the report cannot be written"),
    ],
)
def test_errors_say_where_what_was_found_the_rule_and_the_remedy(tmp_path, runs, what):
    run = make_run(tmp_path / "demo")
    (run / "log.txt").touch()
    with pytest.raises((ConfigError, DataError)) as caught:
        write_report(runs(run), run / "log.txt" / "report.html" if what.endswith("written") else None)
    error = caught.value
    assert error.what == what and error.where and error.value and error.rule and error.remedy
    assert len(str(error).splitlines()) == 4 and error.where not in str(error.value)
