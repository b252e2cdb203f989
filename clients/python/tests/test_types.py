"""The bookkeeping of a request, without a broker."""

import unittest

from quiver_client import ProtocolError
from quiver_client.types import Request, submit_map


def tokens(index, seq, text, ids, **more):
    return {"type": "tokens", "id": "1", "index": index, "seq": seq, "text": text, "tokens": ids, **more}


def done(index, seq, **more):
    return {"type": "done", "id": "1", "index": index, "seq": seq, "finish_reason": "stop", "usage": {}, **more}


class Submit(unittest.TestCase):
    def test_the_first_argument_tells_prompt_tokens_and_messages_apart(self):
        self.assertEqual(submit_map("hi")["prompt"], "hi")
        self.assertEqual(submit_map([1, 2])["tokens"], [1, 2])
        self.assertEqual(submit_map([{"role": "user", "content": "hi"}])["messages"][0]["role"], "user")
        with self.assertRaises(TypeError):
            submit_map(7)

    def test_fields_that_are_none_are_left_out(self):
        self.assertNotIn("seed", submit_map("hi", seed=None))

    def test_every_request_has_an_id(self):
        self.assertNotEqual(submit_map("hi")["id"], submit_map("hi")["id"])
        self.assertEqual(submit_map("hi", request_id="mine")["id"], "mine")


class Stream(unittest.TestCase):
    def test_pieces_add_up_to_the_answer(self):
        request = Request({"id": "1"})
        request.feed({"type": "accepted", "id": "1"})
        request.feed(tokens(0, 0, "ab", [1, 2], logprobs=[-1.0, -2.0]))
        request.feed(tokens(0, 1, "c", [3], logprobs=[-3.0]))
        self.assertFalse(request.finished)
        request.feed(done(0, 2))
        self.assertTrue(request.finished)
        answer = request.answers[0]
        self.assertEqual((answer.text, answer.tokens, answer.logprobs), ("abc", [1, 2, 3], [-1.0, -2.0, -3.0]))

    def test_a_whole_answer_comes_with_the_end(self):
        request = Request({"id": "1"})
        delta = request.feed(done(0, 0, text="abc", tokens=[1, 2]))
        self.assertEqual((delta.text, request.answers[0].tokens), ("abc", [1, 2]))

    def test_each_of_n_answers_ends_for_itself(self):
        request = Request({"id": "1", "n": 2})
        request.feed(done(1, 0))
        self.assertFalse(request.finished)
        request.feed(tokens(0, 0, "x", [1]))
        request.feed(done(0, 1))
        self.assertTrue(request.finished)

    def test_a_gap_and_a_repetition_are_noticed(self):
        for seq in (1, 5):
            request = Request({"id": "1"})
            with self.assertRaises(ProtocolError):
                request.feed(tokens(0, seq, "x", [1]))
        request = Request({"id": "1"})
        request.feed(tokens(0, 0, "x", [1]))
        with self.assertRaises(ProtocolError):
            request.feed(tokens(0, 0, "x", [1]))

    def test_an_error_ends_the_request(self):
        request = Request({"id": "1"})
        request.feed({"type": "error", "id": "1", "code": "OVERLOADED", "message": "full", "retry_after_ms": 50})
        self.assertTrue(request.finished)
        self.assertEqual((request.error.code, request.error.retry_after_ms), ("OVERLOADED", 50))


if __name__ == "__main__":
    unittest.main()
