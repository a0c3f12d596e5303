"""The page of measured figures: several benchmarks write to it, each to its own part."""

from bench.page import Figure, figures_table, write_section

PAGE = "# Performance\n\nProse.\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\n\nMore prose.\n"


def test_a_section_is_replaced_and_all_else_stays(tmp_path, capsys):
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    write_section(tmp_path, "measured", ["new", "| table |"])
    assert page.read_text() == PAGE.replace("old", "new\n| table |")
    assert capsys.readouterr().out == "new\n| table |\n"


def test_sections_of_two_benchmarks_leave_each_other_alone(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    for section, text in (("measured controller", "a"), ("measured", "b"), ("measured controller", "c")):
        write_section(tmp_path, section, [text])
    text = page.read_text()
    assert text.startswith(PAGE.replace("old", "b"))
    assert text.endswith("<!-- measured controller: begin -->\nc\n<!-- measured controller: end -->\n")


def test_a_figure_says_whether_it_is_reached():
    reached = [
        Figure("speed", "< 2", "1", True),
        Figure("size", "< 2", "3", False),
        Figure("ratio", "known", "4", None),
    ]
    assert figures_table(reached)[2:] == [
        "| speed | < 2 | 1 | ok |",
        "| size | < 2 | 3 | **missed** |",
        "| ratio | known | 4 |  |",
    ]
