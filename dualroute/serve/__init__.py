"""A model behind HTTP, as OpenAI's API speaks: :mod:`~dualroute.serve.engine` computes,
:mod:`~dualroute.serve.api` answers.
"""
