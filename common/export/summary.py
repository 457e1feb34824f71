"""What a run took: on record, and shown at its end."""

from common.display import Display, gigabytes
from common.run_fields import RunRecord
from common.run_record import Run


def record_seconds(run: Run, seconds: dict[str, float]) -> None:
    """Into run.json: the training of a run's processes adds up, of any other stage the last time counts."""
    earlier = run.record.stage_seconds
    for stage in {"train", "evaluate", "save"} & seconds.keys():
        seconds[stage] += earlier.get(stage, 0.0)
    run.update(stage_seconds=earlier | seconds)


def show_summary(record: RunRecord, seconds: dict[str, float], display: Display) -> None:
    """What it took, beside the estimate."""
    total = sum(seconds.values()) or 1.0
    figures = {"time": ", ".join(f"{name} {value:.1f} s ({value / total:.0%})" for name, value in seconds.items())}
    if "train" in seconds:
        if record.tokens_per_second:  # of one step there is none
            figures["speed"] = (
                f"{record.tokens_per_second:.0f} tokens/s, {record.label_tokens_per_second:.0f} of them labels"
            )
        estimated, peak = record.predicted_peak_bytes or 0, record.peak_memory_bytes or 0
        figures["memory"] = (
            f"peak {gigabytes(peak)}, estimated {gigabytes(estimated)} "
            f"({estimated / max(1, peak) - 1:+.0%}); "
            f"the process in all {gigabytes(record.peak_rss_bytes or 0)}"
        )
        figures["padding"] = (
            f"none in the layers' products, {record.padding_fraction or 0:.1%} of attention's positions"
        )
    display.panel("Done", figures)
