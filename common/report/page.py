"""Pages as HTML: the templates filled, with Vega, the script and the style inlined, and a policy against all else.

Every text is escaped, and scripts run only where their hash is in the page's Content-Security-Policy: what a
stranger's run says is shown, never executed, and nothing is fetched.
"""

import base64
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import strict_json
from common.display import Display, shown
from common.errors import UserError
from common.files import atomic_write
from common.report import sections
from common.report.charts import Chart
from common.report.kept import Kept, read_kept
from common.report.run_charts import run_charts
from common.report.texts import Lang, sentence, template, texts
from common.run_record import Run
from common.system.cache import cache_folder


def write_report(run: Run, lang: Lang = "en", path: Path | None = None, texts_shown: bool = True) -> Path:
    """The run's page, written to report.html in its folder, or to `path`. Raises UserError where there is no run."""
    path = path or run.report
    write_page(path, page(*run_page(read_kept(run, texts_shown), lang), lang))
    return path


def write_own_report(run: Run, display: Display, lang: Lang | None = None) -> None:
    """report.html in the run folder, where nothing else depends on it.

    lang: unless given that in which the run was started.
    """
    with display.optional("no report.html"):
        write_report(run, lang or ("ja" if run.record.options.get("lang") == "ja" else "en"))


def write_page(path: Path, html: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")


def run_page(kept: Kept, lang: Lang) -> tuple[str, str, dict[str, Chart]]:
    """`(title, body, charts)` of one run. Raises UserError where a figure of it is beyond all numbers."""
    t = texts(lang)
    try:
        charts = run_charts(kept, t)
        body = render("run.html", kept=kept, t=t, said=partial(sentence, lang=lang), sections=sections, charts=charts)
    except OverflowError:
        raise UserError(
            f"{kept.run.path} holds a number that is too large to compute with.",
            "Its page cannot be made; the files of the run are as they were.",
        ) from None
    return f"{kept.name} - {t['report']}", body, charts


def page(title: str, body: str, charts: Mapping[str, Chart], lang: Lang, live: bool = False) -> str:
    """The complete file. live: it asks its own server, and nobody else, for what is new."""
    from markupsafe import Markup

    scripts = [_vega(), template("page.js")]
    sources = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    own = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {sources}; "
        f"connect-src {own}; base-uri 'none'; form-action 'none'"
    )
    return render(
        "page.html",
        title=title,
        lang=lang,
        t=texts(lang),
        live=live,
        policy=policy,
        body=Markup(body),  # noqa: S704  it comes from `render`, which escapes
        charts=Markup(_in_script(specs(charts))),  # noqa: S704
        style=Markup(template("page.css")),  # noqa: S704
        scripts=[Markup(script) for script in scripts],  # noqa: S704
    )


def render(name: str, **values: Any) -> str:
    """The template filled; every value is escaped unless it is Markup."""
    return _environment().get_template(name).render(**values)


def specs(charts: Mapping[str, Chart]) -> dict[str, Any]:
    return {key: chart.spec for key, chart in charts.items()}


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _in_script(content: Any) -> str:
    """As JSON that cannot end the script element it stands in."""
    return strict_json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _harmless(value: Any) -> Any:
    """A text without what reverses or hides what is around it; escaping leaves that as it is."""
    return shown(value) if type(value) is str else value


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script. Making it takes two seconds, so it is kept in the user's cache."""
    kept = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    import vl_convert

    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")
    with suppress(OSError, UserError):  # a cache that cannot be written costs time only
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as temporary:
            temporary.write_text(script, encoding="utf-8")
    return script
