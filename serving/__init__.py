"""What is behind serve.py. Nobody needs it to train.

    server         a request's way to its answer: names, text -> ids, waiting, hang-ups
    engine         one thread owns the model: continuous batching, adapters that come and go
    fields         a request's JSON -> checked options
    answers        a reply's events -> OpenAI's JSON, whole or streamed
    metrics        what the engine has counted, for Prometheus
    page.html      what a browser gets: chat, speech, blind votes
"""
