"""Dashboard: a workspace of a project on W&B, whose panels draw what runs log."""

from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from dynlight.errors import SettingError, require, told
from dynlight.recording.names import (
    AXES,
    BITS_PER_BYTE,
    COST,
    COSTS,
    COSTS_OF_TEACHER,
    DOCUMENTS,
    GAIN,
    NATS_PER_TOKEN,
    REPORT,
    SEGMENT,
    SEGMENT_GAIN,
    WEIGHT,
    WORD_PERPLEXITY,
    over,
)

_NAME = "dynlight"  # as people see it
_VIEW = "nw-dynlight-v"  # as W&B finds it again; `nw-…-v` is how W&B names what it shows under `?nw=…`
_SCORE, _FLOPS = "bits_per_byte", "flops"  # keys of summary.json, which are W&B's summary of a run
_COLUMNS = (_SCORE, GAIN, "gain_percent", _FLOPS, "tokens_per_second", "protocol")  # likewise, of the list of runs


def save(project: str, entity: str | None, group: str) -> tuple[str, bool]:
    """Makes the workspace on W&B, or renews the one that was made before.

    Renewed are the sections that it has here; those that a user added, and which runs are shown and how, stay.

    Args:
        project: on W&B, with a run in it.
        entity: the user or team that owns the project; None: the account's own.
        group: the setting by which the section of sweeps groups runs, as in the YAML: `update.init_args.lr`.

    Returns:
        The workspace's address, and whether it was there before.

    Raises:
        SettingError: if there is no account, no such project or no answer, or W&B refuses.
    """
    _log_in(project)
    try:
        api = wandb.Api()
        entity = entity or api.settings["entity"] or api.default_entity or ""
        require(entity != "", "entity", "be given, as the account has none of its own", got="nothing")
        made = ws.Workspace(
            entity=entity,
            project=project,
            name=_NAME,
            sections=sections(group),
            settings=ws.WorkspaceSettings(max_runs=100),
            runset_settings=ws.RunsetSettings(pinned_columns=[f"summary:{name}" for name in _COLUMNS]),
        )
        made._internal_name = _VIEW
        earlier = _earlier(made)
        if earlier is not None:
            ours = {section.name for section in made.sections}
            earlier.sections = made.sections + [each for each in earlier.sections if each.name not in ours]
        return (earlier or made).save().url, earlier is not None
    except SettingError:
        raise
    except wandb.Error as error:
        must, advice = "be of an account at a W&B that answers", "look to the network, WANDB_BASE_URL and `wandb login`"
        raise SettingError("WANDB_API_KEY", must, got=f"from W&B: {_line(error)}", advice=advice) from error
    except Exception as error:  # of W&B's transport, which has no public kind, or of the library that reads the answer
        got = told("from W&B", error)
        raise SettingError("project", "be one whose workspace W&B saves", got=got) from error


def _log_in(project: str) -> None:
    """Raises SettingError unless W&B is to be used and there is an account; asks for nothing."""
    # One retry: W&B would try on after the answer is given up, and the command wait for that at its end.
    try:
        mode = wandb.setup(wandb.Settings(silent=True, x_graphql_retry_max=1)).settings.mode
    except ValueError as error:  # of pydantic, by which W&B reads the environment
        raise SettingError("WANDB_…", "be settings that W&B takes", got=_line(error)) from error
    require(mode == "online", "WANDB_MODE", "be online, as a workspace lies at W&B", got=mode)
    try:
        wandb.Settings(project=project)
    except wandb.errors.UsageError as error:
        raise SettingError("project", "be a name that W&B takes", got=_line(error)) from error
    try:
        has_account = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise SettingError("WANDB_API_KEY", "be a key of W&B", got=_line(error)) from error
    require(has_account, "WANDB_API_KEY", "be set", got="nothing", advice="or log in once with `wandb login`")


def _earlier(workspace: ws.Workspace) -> ws.Workspace | None:
    """The workspace as W&B has it; None: it has none yet."""
    try:
        return ws.Workspace.from_url(workspace.url)
    except ValueError as error:  # the library tells by its words alone what is not there
        if str(error).startswith("Project "):
            place = f"{workspace.entity}/{workspace.project}"
            advice = "give its owner by --entity, or log a run first"
            raise SettingError("project", "be one at W&B that the account sees", got=place, advice=advice) from error
        if str(error).startswith("Workspace "):
            return None
        raise


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def sections(group: str) -> list[ws.Section]:
    """All sections of the workspace, the uppermost first; `group` as of `save`."""
    documents = [wr.WeavePanelSummaryTable(table_name=DOCUMENTS), wr.MediaBrowser(title="Report", media_keys=[REPORT])]
    weights = wr.LinePlot(title="Weight of each expert", x="tokens", metric_regex=f"^{WEIGHT}.*", range_y=(0, 1))
    return [
        *(_scores(axis) for axis in reversed(AXES)),
        _section("Gain", *(_line_plot(axis, GAIN) for axis in AXES), _line_plot("tokens", SEGMENT_GAIN)),
        _section("Experts of a mixture", weights, columns=1),
        _section("Documents", *documents, columns=1),
        _sweeps(group),
        _section("Costs", *(_costs(unit) for unit in ("seconds", "flops"))),
    ]


def _scores(axis: str) -> ws.Section:
    pictures = (BITS_PER_BYTE, NATS_PER_TOKEN, WORD_PERPLEXITY, (SEGMENT,))
    return _section(f"Scores over {axis}", *(_line_plot(axis, *names) for names in pictures))


def _sweeps(group: str) -> ws.Section:
    """Runs beside each other: each a point, and those alike in a setting as one line, with the least and the most."""
    score, flops, setting = wr.SummaryMetric(_SCORE), wr.SummaryMetric(_FLOPS), wr.Config(group)
    alike: dict[str, Any] = {"groupby": setting, "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    columns = [wr.ParallelCoordinatesPlotColumn(each) for each in (setting, flops, score)]
    return _section(
        "Sweeps",
        wr.ScatterPlot(title="Score of each run over its FLOPs", x=flops, y=score, log_x=True),
        _line_plot("flops", BITS_PER_BYTE[0], title=f"Bits per byte, by {group}", **alike),
        wr.BarPlot(title=f"Gain in bits per byte, by {group}", metrics=[over("tokens", GAIN)], **alike),
        wr.ParallelCoordinatesPlot(title=f"FLOPs and score, by {group}", columns=columns),
        wr.ParameterImportancePlot(with_respect_to=_SCORE),
    )


def _costs(unit: str) -> wr.LinePlot:
    names = [COST + name for name in COSTS | COSTS_OF_TEACHER if name.endswith(unit)]
    return wr.LinePlot(title=f"Costs so far: {unit}", x="tokens", y=[*names], title_x="tokens")


def _line_plot(axis: str, *series: str, **settings: Any) -> wr.LinePlot:
    """Series over an axis; the first gives the picture its title, if nothing else does."""
    titles = {"title": series[0].replace("_", " ").capitalize(), "title_x": axis}
    return wr.LinePlot(x=axis, y=[over(axis, name) for name in series], **(titles | settings))


def _section(name: str, *panels: Any, columns: int = 3) -> ws.Section:
    rows = -(-len(panels) // columns)
    layout = ws.SectionLayoutSettings(columns=columns, rows=rows)
    return ws.Section(name=name, panels=list(panels), is_open=True, layout_settings=layout)
