"""The server of OpenAI's and Anthropic's APIs.

http/ speaks HTTP, api/ reads requests and writes answers, engine/ generates, watch/ looks on. Each uses what comes
after it, and watch/ the engine alone.
"""
