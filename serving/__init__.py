"""What is behind serve.py. Nobody needs it to train.

    engine         one thread owns the model: continuous batching, adapters that come and go
    fields         a request's JSON -> checked options
    answers        a reply's events -> OpenAI's JSON, whole or streamed
    page.html      what a browser gets: chat, speech, blind votes
"""
