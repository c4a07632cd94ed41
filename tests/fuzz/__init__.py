"""Fuzzing: command lines, damaged files, kills and full disks, seeded. `python -m tests.fuzz --help`"""
