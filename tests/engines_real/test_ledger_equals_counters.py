"""The folder's last word on the shared engine: all rows against all of vLLM's counters since its start."""

from tests.engines_real.books import Books, total


async def test_ledger_equals_counters(whole: Books, session, record_property):
    page = await whole.page(session)
    left = page.unexplained
    estimated = (total(page.estimated, "prompt_tokens"), total(page.estimated, "completion_tokens"))
    lines = {
        "vllm": f"prompt {page.engine.prompt}, of it counted again per choice {page.again}; "
        f"generation {page.engine.generation}; cached {page.engine.cached}",
        "exact": f"{len(page.exact)} rows: prompt {total(page.exact, 'prompt_tokens')}, "
        f"completion {total(page.exact, 'completion_tokens')}",
        "estimated": f"{len(page.estimated)} rows: prompt {estimated[0]} for {left.prompt}, "
        f"completion {estimated[1]} for {left.generation}",
    }
    for name, line in lines.items():
        record_property(name, line)
        print(f"{name}: {line}")
    # To the token, but for what is marked estimated: each test has proved that of its own exact rows; together they can
    # differ from the engine only by the work for clients that left.
    assert page.exact
    if not page.estimated:
        assert left.prompt == left.generation == 0, page
        return
    assert 0.5 * estimated[0] <= left.prompt <= 2 * estimated[0]
    assert estimated[1] <= left.generation <= 2 * estimated[1] + 500
