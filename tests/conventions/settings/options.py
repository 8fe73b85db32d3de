import argparse


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel-block", action="store_true")
    return parser.parse_args()
