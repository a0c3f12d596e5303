"""A simulated inference engine: the HTTP face of vLLM or SGLang, with no model behind it.

It answers the OpenAI and Anthropic shaped endpoints with deterministic text, the engines' own usage placements, error
bodies and `/metrics` names, at latencies and with faults of the user's choice. Quickstart, tests and benchmarks run
against it; its token counters are exact, so that a ledger can be compared with them to the token.

    python -m simengine --listen 127.0.0.1:0 --model NAME

It imports nothing of the other packages: what it says about engines is an independent witness.
"""
