"""One view of a project in Weights & Biases, made once: a section a step in the order of the pipeline, its
health first, by the charts of the report. Needs wandb-workspaces and a server."""

import contextlib
from typing import Any

from pipeline import steps

NAME = "rlhf-pipeline"

_VIEWS = """query Views($entity: String!, $project: String!) { project(name: $project, entityName: $entity) {
  allViews(viewType: "project-view") { edges { node { displayName } } } } }"""


def ensure(entity: str, project: str) -> None:
    """Make the view where the project has none of its name; nothing where that is not possible."""
    with contextlib.suppress(Exception):
        import wandb
        from wandb_workspaces._graphql import execute_graphql

        asked = {"entity": entity, "project": project}
        found = execute_graphql(wandb.Api(), _VIEWS, asked)
        edges = found["project"]["allViews"]["edges"]
        if NAME not in [edge["node"]["displayName"] for edge in edges]:
            workspace(entity, project).save()


def workspace(entity: str, project: str) -> Any:
    """The view: every curve against its stage's own step, what was evaluated last."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = []
    for name, step in steps.stages().items():
        charts = getattr(steps.about(name), "CHARTS", [])
        panels = [
            wr.LinePlot(title=chart.title, x=f"{name}/step", y=list(chart.series.values()))
            for chart in charts
        ]
        samples = [wr.MediaBrowser(media_keys=["samples"])] if step.policy else []
        sections.append(ws.Section(name=step.title, panels=[*panels, *samples], is_open=True))
    of_policies: list[Any] = [f"models/{name}/judge" for name in steps.policies()]
    measured: list[Any] = [wr.BarPlot(title="Judge's grade", metrics=of_policies), wr.RunComparer()]
    sections.append(ws.Section(name="Evaluation", panels=measured, is_open=True))
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)
