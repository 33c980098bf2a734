"""A plan as a picture: what the memory holds, and what the step waits for."""

from typing import Any

from fjft.planning.report import Report


def draw(report: Report) -> Any:
    """Draws a plan.

    Left: the parts of the peak, on one device, against its limit. Right: seconds that
    one step would take at the peak rate of each resource; the longest is the roofline.

    Returns:
      A matplotlib figure, which a notebook shows; `.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    memory, time = figure.subplots(1, 2)
    left = 0.0
    for part, nbytes in report.parts.items():
        size = nbytes / 2**30
        memory.barh([""], [size], left=left, label=f"{part} {size:.2f}")
        left += size
    if report.limit_bytes is not None:
        limit = report.limit_bytes / 2**30
        memory.axvline(limit, color="black", linestyle="--", label=f"limit {limit:.2f}")
    memory.set_xlabel("GiB on one device")
    memory.set_title("fits" if report.fits else "does not fit")
    memory.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25))
    times = {
        "FLOPs": report.compute_seconds,
        "memory": report.memory_seconds,
        "interconnect": report.link_seconds,
    }
    known = {name: seconds for name, seconds in times.items() if seconds is not None}
    time.barh(list(known), list(known.values()))
    time.set_xlabel("seconds a step at the peak rate")
    speed = report.tokens_per_second
    time.set_title(
        f"at best {speed:,.0f} tokens/s, MFU {report.mfu:.0%}"
        if speed
        else "peak rates are not known"
    )
    return figure
