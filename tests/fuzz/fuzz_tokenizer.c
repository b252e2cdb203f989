/* Any bytes, as a tokenizer.json. What opens encodes text, within bounds, into ids that it knows,
 * and what it decodes is UTF-8, the same at once as piece by piece. */
#include "common/utf8.h"
#include "models/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_TOKENS = 4096 };

static const char *const texts[] = {
    "",
    "Hello, world!  12 + 345 = 357\n\n",
    " <s>the</s> <|im_end|>\t\r\n",
    "\xc3\xa9t\xc3\xa9 e\xcc\x81t\xc3\xa9 \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x91\x9f\xe2\x80\x8d",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
};

static void check_decode(const qv_tokenizer *tok, const qv_tokens *tokens, bool skip_special)
{
    char *whole, *pieces = malloc(tokens->count * qv_tokenizer_max_text(tok) + 4);
    size_t len, n = 0;
    qv_detok detok;
    QV_ASSERT(pieces != NULL);
    QV_ASSERT(qv_tokenizer_decode(tok, tokens->data, tokens->count, skip_special, &whole, &len) ==
              QV_OK);
    qv_detok_init(&detok, skip_special);
    for (size_t i = 0; i < tokens->count; i++)
        n += qv_detok_push(&detok, tok, tokens->data[i], pieces + n);
    n += qv_detok_flush(&detok, pieces + n);
    QV_ASSERT(n == len && memcmp(pieces, whole, len) == 0);
    QV_ASSERT(qv_utf8_valid(whole, len));
    free(pieces);
    free(whole);
}

static void check_tokenizer(const qv_tokenizer *tok)
{
    size_t vocab = qv_tokenizer_vocab_size(tok);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        for (unsigned flags = 0; flags < 4; flags++) {
            qv_tokens tokens = {0};
            if (qv_tokenizer_encode(tok, texts[i], strlen(texts[i]), flags, MAX_TOKENS, &tokens) ==
                QV_OK) {
                QV_ASSERT(tokens.count <= MAX_TOKENS);
                for (size_t k = 0; k < tokens.count; k++)
                    QV_ASSERT(tokens.data[k] >= 0 && (size_t)tokens.data[k] < vocab);
                check_decode(tok, &tokens, flags & 1);
            }
            qv_tokens_deinit(&tokens);
        }
    for (size_t id = 0; id < vocab && id < 1000; id++) {
        size_t len;
        const char *text = qv_tokenizer_token(tok, (int32_t)id, &len);
        QV_ASSERT(text == NULL || qv_tokenizer_find(tok, text, len) >= 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    static char path[32];
    if (fd < 0) {
        fd = memfd_create("tokenizer.json", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    QV_ASSERT(fd >= 0 && ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    qv_tokenizer *tok;
    if (qv_tokenizer_open(path, &tok) != QV_OK)
        return 0;
    check_tokenizer(tok);
    qv_tokenizer_close(tok);
    return 0;
}
