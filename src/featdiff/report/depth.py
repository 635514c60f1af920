"""How deep in the network lies what was gained: the original and the tuned model stitched together (`stitch`)."""

from __future__ import annotations

from featdiff.report.charts import Figure, Panel, Trace, error_bars, layout, line, title
from featdiff.report.claims import Claims
from featdiff.report.words import interval, listed, percent, things
from featdiff.stats import Interval


def levels(claims: Claims, lower: str) -> list[tuple[int, Interval]]:
    """Accuracy away from math by number of blocks of ``lower`` (``original`` or ``tuned``) below the seam; with none and with
    all it is that of the models themselves, on the same questions."""
    evidence = claims.evidence
    right = claims.outcomes.stitched(lower)
    if not right:
        return []
    asked = set().union(*right.values())
    upper = "tuned" if lower == "original" else "original"
    for depth, part in ((0, upper), (evidence.blocks, lower)):
        whole = claims.outcomes.model(getattr(evidence.roles, part))
        right = right | {depth: {key: share for key, share in whole.items() if key in asked}}
    found = ((depth, claims.estimate(evidence.far, right[depth])) for depth in sorted(right))
    return [(depth, level) for depth, level in found if level]


def figure(claims: Claims) -> Panel | None:
    """Accuracy against the depth of the seam, in both orders; None where nothing was stitched."""
    evidence = claims.evidence
    names, roles, traces, legend = evidence.names, evidence.roles, list[Trace](), list[tuple[str, str]]()
    for lower, upper in (("original", "tuned"), ("tuned", "original")):
        found = levels(claims, lower)
        if not found:
            return None
        below, above = (names.label(getattr(roles, part)) for part in (lower, upper))
        colour = names.colour(getattr(roles, lower))
        values = [level.value for _, level in found]
        label = f"{below} below the seam, {above} above"
        legend.append((label, colour))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": [depth for depth, _ in found],
                "y": values,
                "line": {"color": colour, "width": 2},
                "marker": {"color": colour, "size": 7},
                "error_y": error_bars(values, [level.low for _, level in found], [level.high for _, level in found])
                | {"color": colour, "thickness": 0.7, "width": 0},
                "customdata": [[interval(level.low, level.high), level.n] for _, level in found],
                "hovertemplate": f"{label}<br>%{{x}} blocks below<br>accuracy %{{y:.3f}} %{{customdata[0]}}, "
                "n = %{customdata[1]}<extra></extra>",
            }
        )
    look = layout(
        {"title": title("blocks below the seam"), "dtick": 1 if evidence.blocks < 20 else 5},
        {"title": title("accuracy"), "range": [-0.03, 1.03]},
        shapes=[line(evidence.hooked, evidence.hooked, 0, 1, yref="paper", dash="dot")],
    )
    caption = (
        f"{listed(evidence.far)}, report split, {things(traces[0]['customdata'][0][1], 'question')}, tasks count the same. "
        f"Bars: {percent(claims.params.confidence)} bootstrap interval. Dotted: the layer at which features are read. "
        "At the ends are the models themselves."
    )
    return Panel([Figure("stitched", "Two models stitched together", traces, look)], caption, legend)
