"""What the engine says, API by API: whole answers and event streams, field for field as vLLM and SGLang write them."""
