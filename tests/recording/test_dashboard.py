"""The workspace on W&B: it draws what runs log, is made once and then renewed, and says in a line why it cannot be."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb
import yaml
from folders import configuration
from wandb_workspaces.workspaces import Section, Workspace

from dynlight import dashboard, fit
from dynlight.recording.dashboard import sections
from dynlight.recording.names import (
    AXES,
    COST,
    COSTS_OF_TEACHER,
    DOCUMENTS,
    OF_TEACHER,
    REPORT,
    SEGMENT_GAIN,
    over,
)


def panels(group="update.init_args.lr"):
    """The panels as W&B stores them: of each, its section, its kind and its settings."""
    workspace = Workspace(entity="someone", project="a project", sections=sections(group))
    spec = workspace._spec["spec"]["section"]["panelBankConfig"]["sections"]
    return [(section["name"], panel["viewType"], panel["config"]) for section in spec for panel in section["panels"]]


def strings(value):
    """All texts in plain data."""
    if isinstance(value, dict | list):
        return {text for each in (value.values() if isinstance(value, dict) else value) for text in strings(each)}
    return {value} if isinstance(value, str) else set()


# What is drawn is what is logged


@pytest.fixture(scope="module")
def logged(library, tmp_path_factory):
    """The names in the history, in the configuration and in the summary of an offline run of a mixture, and of one rule."""
    names = {"history": set(), "config": {}, "summary": {}}
    for choice in ({"update": None, "mixture": {}}, {}):
        folder = tmp_path_factory.mktemp("logged")
        config = configuration(library / "model", f"{library}/documents/*.txt", folder / "out") | choice
        config["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": {"mode": "offline"}}
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        assert fit.main(["--config", str(folder / "run.yaml")]) == 0
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
        command += map(str, (folder / "out/wandb").glob("offline-run-*"))
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        for record in map(json.loads, lines):
            if record["type"] == "history":
                names["history"] |= record["history"]["item"].keys()
            elif record["type"] in ("config", "summary"):
                names[record["type"]] |= record[record["type"]].get("update") or {}
    wandb.teardown()
    return names


def plots(setting):
    """Of each panel that has it, one of its settings."""
    return [config[setting] for _, _, config in panels() if setting in config]


@pytest.mark.slow
def test_every_picture_is_of_what_a_run_logs_and_every_series_is_in_one(logged):
    drawn = {name for names in plots("metrics") for name in names}
    lines = {name for name in logged["history"] if name.startswith(("by_", COST))}
    assert len(lines) > 20
    assert lines - drawn == {over("flops", SEGMENT_GAIN)}, "which its place in the documents explains, and not its cost"
    of_teacher = {over(axis, name) for axis in AXES for name in OF_TEACHER} | {COST + name for name in COSTS_OF_TEACHER}
    assert drawn - lines == of_teacher
    axes = {name for name in plots("xAxis") if not name.startswith("summary:")}
    assert axes == set(AXES)
    assert axes < logged["history"]


@pytest.mark.slow
def test_the_weights_of_experts_are_found_by_what_their_names_begin_with(logged):
    (pattern,) = plots("metricRegex")
    found = {name for name in logged["history"] if re.search(pattern, name)}
    assert found == {name for name in logged["history"] if "weight" in name}
    assert "weight/static" in found
    assert len(found) > 2


@pytest.mark.slow
def test_the_documents_and_the_report_are_found_by_their_names(logged):
    assert logged["summary"][f"{DOCUMENTS}._type"] == "table-file"
    (table,) = [
        texts for section, _, config in panels() if section == "Documents" and DOCUMENTS in (texts := strings(config))
    ]
    assert "run-summary" in table
    assert plots("mediaKeys") == [[REPORT]]
    assert logged["summary"][f"{REPORT}._type"] == "html-file"


@pytest.mark.slow
def test_runs_are_compared_by_their_summary_and_grouped_by_their_settings(logged):
    accessors = [column["accessor"] for columns in plots("columns") for column in columns]
    accessors += [name for axis in ("xAxis", "yAxis") for name in plots(axis) if ":" in name]
    columns = ["config:update.value.init_args.lr", "summary:flops", "summary:bits_per_byte"]
    assert accessors == [*columns, *columns[1:]]
    assert plots("groupBy") == ["update.value.init_args.lr"] * 2
    assert logged["config"]["update"]["init_args"]["lr"] == 0.05
    assert {"flops", *plots("targetKey")} <= logged["summary"].keys()


# W&B itself, as far as a workspace needs it


class Stub(BaseHTTPRequestHandler):
    """Answers as W&B does, by what it was told before; `server` keeps the views by name, and what was posted."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, told = asked["query"], asked.get("variables")
        self.server.posted.append((query.split("(")[0].split("{")[0].strip(), told))
        views = self.server.views
        data = {"viewer": {"id": "1", "entity": self.server.entity, "username": "someone", "flags": "{}"}}
        refused = bool(self.server.refuses) and self.server.refuses in query
        if "upsertView" in query and not refused:
            key = told.get("id") or f"id{len(views)}"
            inserted = key not in views
            views[key] = {"id": key, "name": told["name"], "displayName": told["displayName"], "spec": told["spec"]}
            data = {"upsertView": {"view": views[key], "inserted": inserted}}
        elif "allViews" in query:
            found = [{"node": view} for view in views.values() if view["name"] == told["viewName"]]
            data = {"project": {"allViews": {"edges": found}} if told["name"] == "a-project" else None}
        answer = {"errors": [{"message": "not\nallowed"}]} if refused else {"data": data}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A W&B on this machine, with an account there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.views, server.posted, server.entity, server.refuses = {}, [], "someone", ""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("WANDB_MODE", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield server
    wandb.teardown()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def save(capsys):
    """Calls the door; returns the exit status, and what was printed."""

    def save(*arguments):
        status = dashboard.main(arguments)
        return status, *capsys.readouterr()

    return save


def saved(server):
    return [told for name, told in server.posted if name.startswith("mutation")]


def test_it_is_made_once_and_then_renewed(server, save):
    address = f"http://127.0.0.1:{server.server_port}/someone/a-project?nw=dynlight\n"
    assert save("--project", "a-project") == (0, f"made    {address}", "")
    assert save("--project", "a-project") == (0, f"renewed {address}", "")
    assert len(server.views) == 1
    first, second = saved(server)
    assert "id" not in first
    assert second["id"] == "id0"
    for told in (first, second):
        assert [told[name] for name in ("entityName", "projectName", "name")] == [
            "someone",
            "a-project",
            "nw-dynlight-v",
        ]
        names = [section["name"] for section in json.loads(told["spec"])["section"]["panelBankConfig"]["sections"]]
        assert names == [section.name for section in sections("any")]
        assert len(set(names)) == len(names)


def test_what_a_user_added_to_it_stays(server, save):
    save("--project", "a-project")
    (address,) = re.findall(r"http\S+", save("--project", "a-project")[1])
    theirs = Workspace.from_url(address)
    theirs.sections = [Section(name="Mine"), *theirs.sections[2:]]
    theirs.settings.smoothing_type = "gaussian"
    theirs.save()
    assert save("--project", "a-project", "--group", "schedule.every")[0] == 0
    spec = json.loads(saved(server)[-1]["spec"])["section"]
    names = [section["name"] for section in spec["panelBankConfig"]["sections"]]
    assert names == [*(section.name for section in sections("any")), "Mine"]
    assert spec["settings"]["smoothingType"] == "gaussian"
    assert "schedule.value.every" in strings(spec)
    assert "update.value.init_args.lr" not in strings(spec)


def test_an_entity_that_is_given_owns_it(server, save):
    status, printed, _ = save("--project", "a-project", "--entity", "a-team")
    assert (status, saved(server)[-1]["entityName"]) == (0, "a-team")
    assert "/a-team/a-project?" in printed


def test_a_project_that_is_not_there_is_said_in_a_line(server, save):
    assert save("--project", "another") == (
        2,
        "",
        "error: project must be one at W&B that the account sees, got someone/another; give its owner by --entity, or log a "
        "run first\n",
    )
    assert saved(server) == []


@pytest.mark.parametrize("refuses", ["upsertView", "allViews"])
def test_what_wandb_refuses_is_said_in_a_line(server, save, refuses):
    server.refuses = refuses
    status, printed, error = save("--project", "a-project")
    assert (status, printed) == (2, "")
    assert error.startswith("error: project must be one whose workspace W&B saves, got from W&B: ")
    assert "not allowed" in error
    assert error.count("\n") == 1
    assert server.views == {}


def test_a_workspace_that_cannot_be_read_is_not_made_a_second_time(server, save):
    save("--project", "a-project")
    server.views["id0"]["spec"] = '{"version": 99}'
    status, _, error = save("--project", "a-project")
    assert status == 2
    assert "please upgrade" in error
    assert error.count("\n") == 1
    assert len(saved(server)) == 1


def test_an_account_without_an_entity_needs_one_given(server, save):
    server.entity = None
    error = "error: entity must be given, as the account has none of its own, got nothing\n"
    assert save("--project", "a-project") == (2, "", error)


def test_where_wandb_cannot_be_reached_a_line_says_so(server, save):
    server.shutdown()
    server.server_close()
    status, printed, error = save("--project", "a-project")
    assert (status, printed) == (2, "")
    assert error.startswith(
        "error: WANDB_API_KEY must be of an account at a W&B that answers, got from W&B: Failed to "
    )
    assert f"127.0.0.1:{server.server_port}: connect: connection refused" in error
    assert error.endswith("; look to the network, WANDB_BASE_URL and `wandb login`\n")
    assert error.count("\n") == 1


# Before W&B is asked


@pytest.mark.parametrize(
    ("arguments", "environment", "error"),
    [
        (["--project", "a/b"], {}, "project must be a name that W&B takes, got Invalid project name 'a/b'"),
        (["--project", "x" * 129], {}, "project must be a name that W&B takes, got Invalid project name 'xxx"),
        (["--project"], {}, "project must be given a value, got nothing"),
        (["--entity", "someone"], {}, "project must be given as --project X, got nothing"),
        (["--project", "x", "--group="], {}, "group must be given a value, got nothing"),
        (["--projects", "x"], {}, "an option must be one of --project, --entity, --group, got --projects"),
        (["--project", "x", "--names", "y"], {}, "an option must be one of --project, --entity, --group, got --names"),
        (
            ["--project", "x"],
            {"WANDB_MODE": "offline"},
            "WANDB_MODE must be online, as a workspace lies at W&B, got offline",
        ),
        (
            ["--project", "x"],
            {"WANDB_API_KEY": "short"},
            "WANDB_API_KEY must be a key of W&B, got WANDB_API_KEY invalid",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(server, save, monkeypatch, arguments, environment, error):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, printed, said = save(*arguments)
    assert (status, printed) == (2, "")
    assert said.startswith(f"error: {error}")
    assert said.count("\n") == 1
    assert server.posted == []


def test_without_an_account_a_line_says_how_to_have_one(server, save, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    error = "error: WANDB_API_KEY must be set, got nothing; or log in once with `wandb login`\n"
    assert save("--project", "x") == (2, "", error)


def test_without_the_package_a_line_says_how_to_install_it(save, monkeypatch):
    monkeypatch.delitem(sys.modules, "dynlight.recording.dashboard")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    status, _, error = save("--project", "x")
    assert status == 2
    assert error.startswith("error: wandb-workspaces must be installed, got ")
    assert error.endswith("; pip install 'dynlight[wandb]'\n")


def test_help(save):
    status, printed, _ = save("--help")
    assert (status, save()) == (0, (0, printed, ""))
    assert printed.startswith("usage: python -m dynlight.dashboard --project X")
