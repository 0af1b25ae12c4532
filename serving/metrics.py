"""GET /metrics: what the engine has counted, in Prometheus' text format (version 0.0.4)."""
from memory import rss
from serving.engine import Engine


def prometheus(engine: Engine) -> str:
    c = engine.counts.copy()  # the engine's thread may add a name meanwhile
    ends = {kind: n for (_, kind), n in ((k, n) for k, n in c.items() if isinstance(k, tuple))}
    rows = [("prompt_tokens_total", "counter", "Tokens of prompts that were read.", c["prompt_tokens"]),
            ("generated_tokens_total", "counter", "Tokens of replies.", c["generated_tokens"]),
            ("forwards_total", "counter", "Forwards of the model.", c["forwards"]),
            ("requests_running", "gauge", "Replies that have a slot.", len(engine.running)),
            ("requests_waiting", "gauge", "Replies that wait for a slot.", len(engine.waiting)),
            ("slots", "gauge", "Slots of the KV cache.", engine.n_slots),
            ("adapters", "gauge", "LoRA adapters that are loaded.", len(engine.adapters)),
            ("kv_cache_bytes", "gauge", "Memory of the KV cache.", engine.cache.nbytes),
            ("resident_bytes", "gauge", "Memory of the process.", rss())]
    text = "".join(f"# HELP bytewise_{name} {about}\n# TYPE bytewise_{name} {kind}\nbytewise_{name} {value}\n"
                   for name, kind, about, value in rows)
    text += ("# HELP bytewise_first_token_seconds From a request to its first token.\n"
             "# TYPE bytewise_first_token_seconds summary\n"
             f"bytewise_first_token_seconds_sum {c['first_token_seconds']}\n"
             f"bytewise_first_token_seconds_count {c['first_tokens']}\n")
    text += "# HELP bytewise_requests_total Replies that ended, and how.\n# TYPE bytewise_requests_total counter\n"
    return text + "".join(f'bytewise_requests_total{{end="{kind}"}} {n}\n' for kind, n in sorted(ends.items()))
