"""Functions, and none of them makes a model."""


def gelu(x):
    return x


def softmax(x):
    return x
