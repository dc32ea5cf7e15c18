"""The site and the README table are rendered from cards and kept claims: complete, escaped, and with no dead link."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torchgraft.catalogue.card import Card, Claim
from torchgraft.catalogue.registry import Record, records
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.errors import BadInput
from torchgraft.report.catalogue_pages import load_claims, record_fields, snippet
from torchgraft.report.readme import main as readme_main
from torchgraft.report.readme import readme_table, with_table
from torchgraft.report.records import Candidate, RunRecord
from torchgraft.report.site import build, main, markdown

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>"


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("href", "src") and value is not None]


def parsed(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    return links


def record(**changes: object) -> Record:
    fields = {
        "key": "tiny",
        "title": "A tiny method",
        "authors": "Nobody, 2026",
        "reference": "https://example.org/tiny",
        "family": "shrink/prune",
        "kind": "procedure",
        "equation": "y = x < 1",
        "entry": "Record",
        "oracles": ("strength 0 is the identity",),
        "claim": Claim(text="tiny beside nothing, on digits", figure="drop <= 0.02"),
        "choose_when": "you want nothing to change",
        "choose_instead": "anything else, such as magnitude",
        "bibtex": "@misc{tiny}",
    }
    return Record(card=Card.model_validate({**fields, **changes}), checks=3, verdict="not run")


def claim(key: str, **parts: bool) -> ClaimRecord:
    figure = "drop <= 0.02"
    return judge(
        key,
        figure,
        metrics={"score": [0.5, 0.7]},
        effects={"drop": 0.03},
        parts=parts or {"drop": False},
        seeds=[0, 1],
        seconds=2,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "results" / "claims").mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build(ROOT, out)
    return out


def test_every_method_and_family_has_its_page(site: Path) -> None:
    assert {path.stem for path in (site / "methods").glob("*.html")} == set(records())
    families = {record.card.family.replace("/", "-") for record in records().values()}
    assert {path.stem for path in (site / "families").glob("*.html")} == families


def test_no_link_is_dead_and_nothing_is_fetched(site: Path) -> None:
    for page in site.rglob("*.html"):
        links = parsed(page)
        assert not {"script", "img", "iframe"} & set(links.tags)
        for link in links.found:
            if not link.startswith(("https://", "http://", "data:,", "#")):
                assert (page.parent / link.partition("#")[0]).is_file(), f"{page.name} links to {link}"


def test_a_method_page_holds_its_card(site: Path) -> None:
    for key, found in records().items():
        text = (site / "methods" / f"{key}.html").read_text(encoding="utf-8")
        for part in (f"torchgraft check {key}", found.card.entry, found.card.reference, "Cite it"):
            assert part in text, (key, part)


def test_every_snippet_compiles_and_imports_what_exists() -> None:
    for found in records().values():
        code = snippet(found)
        compile(code, found.card.key, "exec")
        assert found.card.entry in code
        imports = [line for line in code.splitlines() if line.startswith(("from ", "import "))]
        exec("\n".join(imports), {})


def test_the_verdict_of_a_kept_claim_is_shown_with_its_numbers(checkout: Path) -> None:
    key = next(key for key, found in records().items() if found.card.claim is not None)
    path = checkout / "results" / "claims" / f"{key}.json"
    path.write_text(claim(key).model_dump_json(), encoding="utf-8")
    build(checkout, checkout / "site")
    text = (checkout / "site" / "methods" / f"{key}.html").read_text(encoding="utf-8")
    for part in ("not reproduced", "0.5, 0.7", "effect: drop", "0.03"):
        assert part in text
    assert ">not run<" not in text
    assert "not reproduced" in (checkout / "site" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["{", '{"key": "optin"}', '{"surprise": 1}'])
def test_a_damaged_claim_is_refused(checkout: Path, damage: str) -> None:
    (checkout / "results" / "claims" / "optin.json").write_text(damage, encoding="utf-8")
    with pytest.raises(BadInput, match=r"optin\.json is no claim record"):
        load_claims(checkout / "results" / "claims")


def test_a_claim_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(claim("tiny").model_dump_json(), encoding="utf-8")
    with pytest.raises(BadInput, match="name the file after its key"):
        load_claims(tmp_path)


def test_markup_in_cards_and_prose_is_shown_and_never_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchgraft.report.catalogue_pages.entry", lambda card: Record)
    evil = record(title=f"x {EVIL}", choose_when=f"always {EVIL}", oracles=(EVIL,), equation=EVIL)
    (checkout / "docs" / "index.md").write_text(f"# Title\n\n{EVIL}\n", encoding="utf-8")
    build(checkout, checkout / "site", methods={"tiny": evil})
    for page in (checkout / "site").rglob("*.html"):
        assert "script" not in parsed(page).tags


def test_markdown_tables_and_links_between_pages() -> None:
    html = markdown("| a |\n|---|\n| [b](choose.md) |\n")
    assert "<table>" in html
    assert '<a href="choose.html">' in html
    assert '<a href="https://x.org/a.md">' in markdown("[b](https://x.org/a.md)")
    assert "javascript:" not in markdown("[b](javascript:alert)").replace("(javascript:alert)", "")


def test_the_fields_of_a_record_all_have_their_meaning() -> None:
    for model in (RunRecord, Candidate):
        assert [name for name, _, meaning in record_fields(model) if not meaning] == []
    assert ("max_drop", "float | null") in [(name, kind) for name, kind, _ in record_fields(RunRecord)]


def test_outside_a_checkout_the_site_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "--out", str(tmp_path / "site")]) == 2
    assert "index.md" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_the_table_of_the_readme_is_up_to_date() -> None:
    assert readme_main(["--check", str(ROOT / "README.md")]) == 0


def test_the_readme_table_links_to_files_that_exist() -> None:
    links = [part.split(")")[0] for part in readme_table(records().values()).split("](")[1:]]
    assert len(links) == len(records())
    assert len(links) == len(records())
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_readme_table_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("head\n<!-- catalogue -->\nold\n<!-- /catalogue -->\ntail\n", encoding="utf-8")
    assert readme_main(["--check", str(path)]) == 1
    assert readme_main([str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("head\n<!-- catalogue -->\n| family |")
    assert text.endswith("|\n<!-- /catalogue -->\ntail\n")
    assert "\nold\n" not in text
    assert readme_main(["--check", str(path)]) == 0


def test_the_readme_table_counts_what_was_reproduced() -> None:
    both = readme_table([record(key="one"), record(key="two")]).splitlines()
    assert len(both) == 3
    assert "`one`" in both[2]
    assert both[2].endswith(" of 2 |")
    assert readme_table([record(key="base", claim=None)]).endswith("| baselines, no claims |")


@pytest.mark.parametrize("text", ["no markers", "<!-- /catalogue --><!-- catalogue -->", "<!-- catalogue -->"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="markers"):
        with_table(text, "")
