#include "common/msgpack_io.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#define BYTES(s) s, sizeof(s) - 1

static const qv_msgpack_limits limits = {.max_depth = 8, .max_nodes = 1000};

Test(msgpack_io, reads_every_form_of_every_kind)
{
    static const struct {
        const char *bytes;
        size_t size;
        qv_item_kind kind;
        int64_t integer; /* INT, UINT, BOOL; size of the others */
        double real;
    } cases[] = {
        {BYTES("\xc0"), QV_ITEM_NIL, 0, 0},
        {BYTES("\xc2"), QV_ITEM_BOOL, 0, 0},
        {BYTES("\xc3"), QV_ITEM_BOOL, 1, 0},
        {BYTES("\x00"), QV_ITEM_UINT, 0, 0},
        {BYTES("\x7f"), QV_ITEM_UINT, 127, 0},
        {BYTES("\xcc\xff"), QV_ITEM_UINT, 255, 0},
        {BYTES("\xcd\xff\xfe"), QV_ITEM_UINT, 65534, 0},
        {BYTES("\xce\xff\xff\xff\xff"), QV_ITEM_UINT, 4294967295, 0},
        {BYTES("\xcf\x7f\xff\xff\xff\xff\xff\xff\xff"), QV_ITEM_UINT, INT64_MAX, 0},
        {BYTES("\xe0"), QV_ITEM_INT, -32, 0},
        {BYTES("\xff"), QV_ITEM_INT, -1, 0},
        {BYTES("\xd0\x80"), QV_ITEM_INT, -128, 0},
        {BYTES("\xd0\x05"), QV_ITEM_UINT, 5, 0},
        {BYTES("\xd1\x80\x00"), QV_ITEM_INT, -32768, 0},
        {BYTES("\xd2\x80\x00\x00\x00"), QV_ITEM_INT, INT32_MIN, 0},
        {BYTES("\xd3\x80\x00\x00\x00\x00\x00\x00\x00"), QV_ITEM_INT, INT64_MIN, 0},
        {BYTES("\xca\x3f\xc0\x00\x00"), QV_ITEM_FLOAT, 0, 1.5},
        {BYTES("\xcb\xbf\xf8\x00\x00\x00\x00\x00\x00"), QV_ITEM_FLOAT, 0, -1.5},
        {BYTES("\xa0"), QV_ITEM_STR, 0, 0},
        {BYTES("\xa3"
               "abc"),
         QV_ITEM_STR, 3, 0},
        {BYTES("\xd9\x01"
               "a"),
         QV_ITEM_STR, 1, 0},
        {BYTES("\xda\x00\x01"
               "a"),
         QV_ITEM_STR, 1, 0},
        {BYTES("\xdb\x00\x00\x00\x01"
               "a"),
         QV_ITEM_STR, 1, 0},
        {BYTES("\xc4\x01\xff"), QV_ITEM_BIN, 1, 0},
        {BYTES("\xc5\x00\x01\xff"), QV_ITEM_BIN, 1, 0},
        {BYTES("\xc6\x00\x00\x00\x01\xff"), QV_ITEM_BIN, 1, 0},
        {BYTES("\x92\x01\x02"), QV_ITEM_ARRAY, 2, 0},
        {BYTES("\xdc\x00\x01\x01"), QV_ITEM_ARRAY, 1, 0},
        {BYTES("\xdd\x00\x00\x00\x01\x01"), QV_ITEM_ARRAY, 1, 0},
        {BYTES("\x81\xa0\x01"), QV_ITEM_MAP, 1, 0},
        {BYTES("\xde\x00\x01\xa0\x01"), QV_ITEM_MAP, 1, 0},
        {BYTES("\xdf\x00\x00\x00\x01\xa0\x01"), QV_ITEM_MAP, 1, 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_item item;
        qv_reader reader = qv_reader_init(cases[i].bytes, cases[i].size);
        cr_assert_eq(qv_reader_next(&reader, &item), QV_OK, "case %zu: %s", i, qv_error());
        cr_assert_eq(item.kind, cases[i].kind, "case %zu", i);
        int64_t got = item.kind == QV_ITEM_BOOL  ? item.boolean
                      : item.kind <= QV_ITEM_INT ? item.integer
                                                 : item.size;
        if (item.kind == QV_ITEM_FLOAT)
            cr_assert_eq(item.real, cases[i].real, "case %zu", i);
        else if (item.kind != QV_ITEM_NIL)
            cr_assert_eq(got, cases[i].integer, "case %zu: %lld", i, (long long)got);
        cr_assert_eq(qv_msgpack_scan(cases[i].bytes, cases[i].size, limits, NULL, 0), QV_OK,
                     "case %zu: %s", i, qv_error());
        reader = qv_reader_init(cases[i].bytes, cases[i].size);
        cr_assert_eq(qv_reader_skip(&reader), QV_OK);
        cr_assert_eq(reader.next, reader.end, "case %zu", i);
    }
}

/* msgpack-c's own unpacker as the judge of what is well formed, over every beginning of two bytes.
 */
Test(msgpack_io, agrees_with_msgpack_c_on_what_is_well_formed)
{
    static const unsigned char tail[] = {0x00, 0x00, 0x01, 0xa1, 'x', 0x02, 0x01, 0x03};
    for (unsigned first = 0; first < 256; first++)
        for (unsigned second = 0; second < 256; second++) {
            if ((first == 0xdd || first == 0xdf) && second > 0)
                continue; /* msgpack-c would allocate gigabytes for what is announced */
            for (size_t size = 1; size <= 2 + sizeof(tail); size++) {
                unsigned char bytes[2 + sizeof(tail)] = {(unsigned char)first,
                                                         (unsigned char)second};
                memcpy(bytes + 2, tail, sizeof(tail));
                bool ext = (first >= 0xc7 && first <= 0xc9) || (first >= 0xd4 && first <= 0xd8);
                qv_reader reader = qv_reader_init(bytes, size);
                bool ours = qv_reader_skip(&reader) == QV_OK;
                msgpack_unpacked result;
                msgpack_unpacked_init(&result);
                size_t used = 0;
                msgpack_unpack_return theirs =
                    msgpack_unpack_next(&result, (const char *)bytes, size, &used);
                bool theirs_ok = theirs == MSGPACK_UNPACK_SUCCESS;
                msgpack_unpacked_destroy(&result);
                /* Extension types, also further in, are ours to refuse. */
                if (ours != theirs_ok && theirs_ok && (ext || strstr(qv_error(), "extension")))
                    continue;
                cr_assert_eq(ours, theirs_ok, "%02x %02x, %zu bytes: %s", first, second, size,
                             ours ? "accepted" : qv_error());
                if (ours)
                    cr_assert_eq((size_t)(reader.next - reader.start), used, "%02x %02x", first,
                                 second);
            }
        }
}

Test(msgpack_io, scan_finds_probed_keys_even_when_the_rest_is_broken)
{
    static const char bytes[] = "\x83\xa1"
                                "a\x81\xa2id\x05\xa2id\xa3one\xa4type";
    qv_msgpack_probe probes[] = {{"type", 0}, {"id", 0}};
    cr_assert_eq(qv_msgpack_scan(bytes, sizeof(bytes) - 1, limits, probes, 2), QV_ERR_FORMAT);
    cr_assert_eq(probes[1].value, 11); /* the outer one, not the one inside `a` */
    cr_assert_eq(probes[0].value, sizeof(bytes) - 1);
    qv_item item;
    qv_reader reader = qv_reader_init(bytes, sizeof(bytes) - 1);
    reader.next += probes[0].value;
    cr_assert_not(qv_reader_try(&reader, &item));
}

Test(msgpack_io, scan_needs_no_memory_and_little_time_for_bombs)
{
    /* Ten million announced values, each level a valid start: the first that cannot fit ends it. */
    static char bytes[1 << 16];
    for (size_t i = 0; i + 5 <= sizeof(bytes); i += 5)
        memcpy(bytes + i, "\xdd\x00\x00\x10\x00", 5);
    qv_msgpack_limits deep = {.max_depth = 1000000, .max_nodes = UINT32_MAX};
    cr_assert_eq(qv_msgpack_scan(bytes, sizeof(bytes), deep, NULL, 0), QV_ERR_LIMIT);
    cr_assert_eq(qv_msgpack_scan(BYTES("\xdf\xff\xff\xff\xff"), deep, NULL, 0), QV_ERR_FORMAT);
}

Test(msgpack_io, knows_valid_utf8)
{
    static const struct {
        const char *text;
        size_t size, valid;
    } cases[] = {
        {BYTES(""), 0},
        {BYTES("plain ascii, more than eight"), 28},
        {BYTES("\x00\x7f"), 2},
        {BYTES("\xc2\x80\xdf\xbf"), 4},
        {BYTES("\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf"), 12},
        {BYTES("\xf0\x90\x80\x80\xf4\x8f\xbf\xbf"), 8},
        {BYTES("ab\x80"), 2},
        {BYTES("\xc0\x80"), 0},         /* overlong */
        {BYTES("\xc1\xbf"), 0},         /* overlong */
        {BYTES("\xe0\x9f\xbf"), 0},     /* overlong */
        {BYTES("\xf0\x8f\xbf\xbf"), 0}, /* overlong */
        {BYTES("\xed\xa0\x80"), 0},     /* surrogate */
        {BYTES("\xf4\x90\x80\x80"), 0}, /* above U+10FFFF */
        {BYTES("\xf5\x80\x80\x80"), 0},
        {BYTES("\xff"), 0},
        {BYTES("12345678\xe2\x82"), 8},     /* cut short */
        {BYTES("1234567\xe2\x82\xac"), 10}, /* across a block of eight */
        {BYTES("\xe2\x28\xa1"), 0},
        {BYTES("a\xf0\x9f\x99"), 1},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *exact = malloc(cases[i].size + (cases[i].size == 0));
        memcpy(exact, cases[i].text, cases[i].size);
        cr_assert_eq(qv_utf8_valid_prefix(exact, cases[i].size), cases[i].valid, "case %zu", i);
        free(exact);
    }
    cr_assert_eq(qv_utf8_cut("a\xe2\x82\xac", 4, 4), 4);
    cr_assert_eq(qv_utf8_cut("a\xe2\x82\xac", 4, 3), 1);
    cr_assert_eq(qv_utf8_cut("a\xe2\x82\xac", 4, 1), 1);
}

Test(msgpack_io, writer_repairs_text_and_notices_a_full_arena)
{
    qv_arena arena;
    qv_arena_init(&arena, 4096, 0);
    qv_msgpack_writer w;
    qv_msgpack_writer_init(&w, &arena);
    qv_msgpack_writer_str(&w,
                          "\xff"
                          "a\xc3",
                          3);
    qv_msgpack_writer_str(&w, NULL, 0);
    cr_assert_eq(qv_msgpack_writer_finish(&w), QV_OK);
    static const char want[] = "\xa7\xef\xbf\xbd"
                               "a\xef\xbf\xbd\xa0";
    cr_assert_eq(w.size, sizeof(want) - 1);
    cr_assert_arr_eq(w.data, want, sizeof(want) - 1);
    qv_arena_deinit(&arena);

    qv_arena_init(&arena, 1024, 4096);
    qv_msgpack_writer_init(&w, &arena);
    for (int i = 0; i < 10000; i++)
        msgpack_pack_uint64(&w.packer, UINT64_MAX);
    cr_assert_eq(qv_msgpack_writer_finish(&w), QV_ERR_LIMIT);
    cr_assert_str_eq(qv_error(), "a message needs more memory than the 4096 bytes of its arena");
    qv_arena_deinit(&arena);
}

Test(msgpack_io, describes_values_for_people)
{
    static const struct {
        const char *bytes;
        size_t size;
        const char *text;
    } cases[] = {
        {BYTES("\xc0"), "nil is no value"},
        {BYTES("\xc3"), "true is a boolean"},
        {BYTES("\xff"), "-1 is an integer"},
        {BYTES("\xcf\xff\xff\xff\xff\xff\xff\xff\xff"), "18446744073709551615 is an integer"},
        {BYTES("\xcb\x3f\xb9\x99\x99\x99\x99\x99\x9a"), "0.1 is a floating-point number"},
        {BYTES("\xa4"
               "a\nb\x7f"),
         "'a?b?' is a string"},
        {BYTES("\xd9\x3c"
               "0123456789012345678901234567890123456789012345678901234567890"),
         "'01234567890123456789012345678901234567890123...' is a string"},
        {BYTES("\xc4\x00"), "this is binary data"},
        {BYTES("\x90"), "this is an array"},
        {BYTES("\x80"), "this is a map"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_item item;
        char text[QV_ITEM_TEXT_MAX];
        qv_reader reader = qv_reader_init(cases[i].bytes, cases[i].size);
        cr_assert_eq(qv_reader_next(&reader, &item), QV_OK);
        cr_assert_str_eq(qv_item_describe(&item, text), cases[i].text);
    }
}
