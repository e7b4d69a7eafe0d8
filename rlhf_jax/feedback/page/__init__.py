"""The labelling page: a server of this machine that shows tasks of a record and writes down what people say.

Nothing else in the package imports it or the web framework, which the extra `label` brings.
"""
