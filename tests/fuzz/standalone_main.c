/* A driver for fuzz targets without libFuzzer: runs every seed as it is, then a fixed number of
 * mutations of them. The same seed gives the same inputs on every machine, and input i does not
 * depend on those before it, so a failure names the command that repeats it.
 *
 *   fuzz_protocol [--runs 20000] [--seed 1] [--first 0] [--max-size 4096] [FILE or FOLDER ...]
 */
#include "tests/support.h"

#include <dirent.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

#define MAX_SEEDS 1024

typedef struct {
    const char *path;
    char *data;
    size_t size;
} seed_file;

static seed_file seeds[MAX_SEEDS];
static size_t n_seeds;
static const char *program;
static uint64_t random_seed = 1;
static int64_t runs = 20000, first_run = 0;
static size_t max_size = 4096;

/* --- what to say when an input kills us --------------------------------------------------------
 */

static char
    replay[512]; /* the sentence, ready before each input: a signal handler may not format */

static void say_replay(void)
{
    ssize_t ignored = write(STDERR_FILENO, replay, strlen(replay));
    (void)ignored;
}

static void on_signal(int number)
{
    say_replay();
    signal(number, SIG_DFL);
    raise(number);
}

static void watch_for_death(void)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    if (__sanitizer_set_death_callback != NULL)
        __sanitizer_set_death_callback(say_replay);
    else
        for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
            signal(signals[i], on_signal);
}

/* --- seeds ----------------------------------------------------------------------------------- */

static void add_seed(const char *path)
{
    if (n_seeds == MAX_SEEDS) {
        fprintf(stderr, "%s: more than %d seeds\n", path, MAX_SEEDS);
        exit(2);
    }
    seed_file *seed = &seeds[n_seeds++];
    seed->path = strdup(path);
    seed->data = qv_read_file(path, &seed->size);
}

static int is_visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* A file, or a folder's files in alphabetical order. */
static void add_seeds(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) {
        fprintf(stderr, "%s: %m\n", path);
        exit(2);
    }
    if (!S_ISDIR(info.st_mode)) {
        add_seed(path);
        return;
    }
    struct dirent **entries;
    int n = scandir(path, &entries, is_visible, alphasort);
    for (int i = 0; i < n; i++) {
        add_seeds(qv_path(path, "%s", entries[i]->d_name));
        free(entries[i]);
    }
    if (n >= 0)
        free(entries);
}

/* --- mutations ------------------------------------------------------------------------------- */

/* An input in the making; `data` has room for max_size bytes. */
typedef struct {
    uint8_t *data;
    size_t size;
} input;

static size_t below(qv_rng *rng, size_t n)
{
    return (size_t)qv_rng_range(rng, 0, (int64_t)n);
}

static void insert(input *in, size_t at, const void *data, size_t size)
{
    if (size > max_size - in->size)
        size = max_size - in->size;
    memmove(in->data + at + size, in->data + at, in->size - at);
    memmove(in->data + at, data, size);
    in->size += size;
}

static void erase(input *in, size_t at, size_t size)
{
    memmove(in->data + at, in->data + at + size, in->size - at - size);
    in->size -= size;
}

/* Bytes and texts at which decoders of msgpack, JSON and templates take turns. */
static const struct {
    const char *data;
    size_t size;
} interesting[] = {
#define TEXT(s)                                                                                    \
    {                                                                                              \
        s, sizeof(s) - 1                                                                           \
    }
    TEXT("\x00"),
    TEXT("\x7f"),
    TEXT("\x80"),
    TEXT("\x90"),
    TEXT("\xa0"),
    TEXT("\xc0"),
    TEXT("\xc1"),
    TEXT("\xc4\xff"),
    TEXT("\xca\x7f\xc0\x00\x00"),
    TEXT("\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00"),
    TEXT("\xcf\xff\xff\xff\xff\xff\xff\xff\xff"),
    TEXT("\xd3\x80\x00\x00\x00\x00\x00\x00\x00"),
    TEXT("\xd4\x00"),
    TEXT("\xd9\xff"),
    TEXT("\xdd\xff\xff\xff\xff"),
    TEXT("\xdf\xff\xff\xff\xff"),
    TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
    TEXT("\xff\xff\xff\xff\xff\xff\xff\x7f"),
    TEXT("\xed\xa0\x80"),
    TEXT("\xe2\x82"),
    TEXT("-1"),
    TEXT("0"),
    TEXT("1e999"),
    TEXT("9223372036854775807"),
    TEXT("18446744073709551616"),
    TEXT("null"),
    TEXT("[]"),
    TEXT("{}"),
    TEXT("[[[["),
    TEXT("\""),
    TEXT("\\u0000"),
    TEXT("{{"),
    TEXT("{%"),
    TEXT("%}"),
    TEXT("../"),
#undef TEXT
};

static void flip_bit(input *in, qv_rng *rng)
{
    in->data[below(rng, in->size)] ^= (uint8_t)(1 << below(rng, 8));
}

static void set_byte(input *in, qv_rng *rng)
{
    in->data[below(rng, in->size)] = (uint8_t)qv_rng_u64(rng);
}

static void add_to_byte(input *in, qv_rng *rng)
{
    in->data[below(rng, in->size)] += (uint8_t)(below(rng, 9) - 4);
}

static void write_interesting(input *in, qv_rng *rng)
{
    size_t which = below(rng, sizeof(interesting) / sizeof(interesting[0]));
    size_t at = below(rng, in->size), size = interesting[which].size;
    if (below(rng, 2) == 0)
        insert(in, at, interesting[which].data, size);
    else
        memcpy(in->data + at, interesting[which].data, size < in->size - at ? size : in->size - at);
}

static void erase_some(input *in, qv_rng *rng)
{
    size_t at = below(rng, in->size), most = in->size - at;
    erase(in, at, 1 + below(rng, most < 16 ? most : 16));
}

static void cut_short(input *in, qv_rng *rng)
{
    in->size = below(rng, in->size);
}

/* Copy a stretch of the input, or of another seed, to some place. */
static void splice(input *in, qv_rng *rng)
{
    uint8_t stretch[64];
    const uint8_t *from = in->data;
    size_t from_size = in->size;
    if (n_seeds > 0 && below(rng, 2) == 0) {
        const seed_file *other = &seeds[below(rng, n_seeds)];
        from = (const uint8_t *)other->data;
        from_size = other->size;
    }
    if (from_size == 0)
        return;
    size_t at = below(rng, from_size), most = from_size - at;
    size_t size = 1 + below(rng, most < sizeof(stretch) ? most : sizeof(stretch));
    memcpy(stretch, from + at, size);
    insert(in, below(rng, in->size + 1), stretch, size);
}

static void (*const mutations[])(input *in, qv_rng *rng) = {
    flip_bit, set_byte, add_to_byte, write_interesting, erase_some, cut_short, splice,
};

static void make_input(int64_t run, input *in)
{
    qv_rng rng = qv_rng_seed(random_seed * UINT64_C(0x9e3779b97f4a7c15) + (uint64_t)run);
    in->size = 0;
    if (n_seeds > 0 && below(&rng, 50) != 0) {
        const seed_file *seed = &seeds[below(&rng, n_seeds)];
        insert(in, 0, seed->data, seed->size);
    } else {
        for (size_t n = below(&rng, 64); in->size < n; in->size++)
            in->data[in->size] = (uint8_t)qv_rng_u64(&rng);
    }
    for (size_t n = 1 + below(&rng, 6); n > 0 && in->size > 0; n--)
        mutations[below(&rng, sizeof(mutations) / sizeof(mutations[0]))](in, &rng);
}

/* --- running --------------------------------------------------------------------------------- */

/* The target gets a block of exactly this size, so that a sanitizer sees reads past its end. */
static void run_one(const void *data, size_t size)
{
    uint8_t *copy = malloc(size > 0 ? size : 1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void run_seeds(void)
{
    for (size_t i = 0; i < n_seeds; i++) {
        snprintf(replay, sizeof(replay), "\nRepeat with: %s --runs 0 %s\n", program, seeds[i].path);
        run_one(seeds[i].data, seeds[i].size);
    }
}

static void run_mutations(void)
{
    input in = {malloc(max_size), 0};
    for (int64_t run = first_run; run < first_run + runs; run++) {
        snprintf(replay, sizeof(replay),
                 "\nRepeat with the same files and: --seed %" PRIu64 " --first %" PRId64
                 " --runs 1\n",
                 random_seed, run);
        make_input(run, &in);
        run_one(in.data, in.size);
    }
    free(in.data);
}

static int64_t number_option(int argc, char **argv, int *i)
{
    char *end = NULL;
    long long value = *i + 1 < argc ? strtoll(argv[*i + 1], &end, 10) : -1;
    if (end == NULL || *end != 0 || value < 0) {
        fprintf(stderr, "%s needs a number\n", argv[*i]);
        exit(2);
    }
    (*i)++;
    return value;
}

int main(int argc, char **argv)
{
    program = argv[0];
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--runs") == 0)
            runs = number_option(argc, argv, &i);
        else if (strcmp(argv[i], "--seed") == 0)
            random_seed = (uint64_t)number_option(argc, argv, &i);
        else if (strcmp(argv[i], "--first") == 0)
            first_run = number_option(argc, argv, &i);
        else if (strcmp(argv[i], "--max-size") == 0)
            max_size = (size_t)number_option(argc, argv, &i) + 1;
        else
            add_seeds(argv[i]);
    }
    watch_for_death();
    run_seeds();
    run_mutations();
    printf("%zu seeds and %" PRId64 " mutated inputs, no failure\n", n_seeds, runs);
    for (size_t i = 0; i < n_seeds; i++) {
        free((char *)seeds[i].path);
        free(seeds[i].data);
    }
    return 0;
}
