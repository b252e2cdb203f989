/* The inside of the template interpreter: values, syntax tree, and one render's state. Used by
 * jinja_*.c and chat_template.c and seen by no one else; chat_template.h is the outside.
 *
 *     jinja_lexer.c    text to tokens, white space control
 *     jinja_parser.c   tokens to a tree; unknown names are refused here (jinja_parse_expr.c has
 *                      the expressions, jinja_parse_stmt.c the statements)
 *     jinja_eval.c     runs the tree
 *     jinja_arithmetic.c operators
 *     jinja_value.c    what values are and how they compare
 *     jinja_print.c    values as text and as JSON
 *     jinja_text.c     Python's string functions
 *     jinja_object.c   attributes, items and slices
 *     jinja_call.c     arguments
 *     jinja_method.c   methods
 *     jinja_function.c global functions
 *     jinja_filter.c   filters
 *     jinja_test.c     tests
 *
 * A program is immutable once parsed. A render owns a qv_jrun; all values it makes live in the
 * run's arena until it ends, so nothing is counted or freed on its own. Python's meaning is
 * followed throughout: text is indexed by code point, `1 == 1.0 == true`, an error has Python's
 * words.
 */
#ifndef QV_MODELS_JINJA_H
#define QV_MODELS_JINJA_H

#include "common/arena.h"
#include "common/status.h"
#include "models/chat_template.h"

/* Text by pointer and length; not terminated. */
typedef struct {
    const char *data;
    size_t len;
} qv_jstr;

#define QV_JSTR(literal) ((qv_jstr){literal, sizeof literal - 1})
#define QV_JSTR_ARG(s)   (int)((s).len > 200 ? 200 : (s).len), (s).data /* for "%.*s" */
#define QV_J_MAX_PARAMS  6
#define QV_J_MAX_HEIGHT  250 /* of a syntax tree */
#define QV_J_MAX_RANGE   100000

/* ---- Values ---------------------------------------------------------------------------------- */

typedef enum {
    QV_J_ABSENT, /* an argument that was not given; never a value of the language */
    QV_J_UNDEFINED,
    QV_J_NONE,
    QV_J_BOOL,
    QV_J_INT,
    QV_J_FLOAT,
    QV_J_STR,
    QV_J_LIST,
    QV_J_TUPLE,
    QV_J_DICT,
    QV_J_VIEW,  /* a dict's keys, values or items */
    QV_J_ITER,  /* what filters such as map return: may be walked once */
    QV_J_RANGE, /* held as a list of its numbers */
    QV_J_NAMESPACE,
    QV_J_MACRO,
    QV_J_FUNCTION, /* a global function */
    QV_J_METHOD,   /* a method with the value it belongs to */
    QV_J_LOOP,
} qv_jtype;

typedef struct qv_jvalue qv_jvalue;
typedef struct qv_jnode qv_jnode;
typedef struct qv_jscope qv_jscope;
typedef struct qv_jloop qv_jloop;
typedef struct qv_jrun qv_jrun;

typedef struct {
    qv_jvalue *items; /* [n] */
    size_t n;
    size_t pos;                /* ITER: how many were taken already */
    const char *name;          /* ITER, VIEW: Python's name of the type */
    int64_t start, stop, step; /* RANGE */
} qv_jseq;

typedef struct qv_jentry qv_jentry;

/* In order of insertion. Grows only while it is built; a namespace's may change later. */
typedef struct {
    qv_jentry *entries; /* [capacity], `n` used */
    uint32_t n, capacity;
    uint32_t *index; /* [2 * capacity] entry + 1 by hash, 0 free; NULL while few */
} qv_jdict;

/* Why a value is undefined: a whole sentence, or what was looked up in what. */
typedef struct qv_jundefined qv_jundefined;

typedef struct {
    const qv_jnode *node; /* MACRO or CALL_BLOCK */
    qv_jscope *scope;     /* where it was defined */
} qv_jmacro;

typedef struct qv_jcallable qv_jcallable;
typedef struct qv_jmethod qv_jmethod;

struct qv_jvalue {
    uint8_t type; /* qv_jtype */
    bool safe;    /* STR: marked by `safe`; joining it with other text escapes that */
    union {
        bool boolean;
        int64_t integer;
        double real;
        const char *str; /* UTF-8, `len` bytes */
        qv_jseq *seq;    /* LIST, TUPLE, VIEW, ITER, RANGE */
        qv_jdict *dict;  /* DICT, NAMESPACE */
        const qv_jundefined *undefined;
        qv_jmacro *macro;
        const qv_jcallable *function;
        qv_jmethod *method;
        qv_jloop *loop;
    };
    size_t len;
};

struct qv_jentry {
    qv_jvalue key, value;
    uint64_t hash;
};

struct qv_jundefined {
    const char *hint; /* the sentence, or NULL */
    qv_jvalue name;   /* what was looked up */
    const char *type; /* of what: "dict object"; NULL: a variable */
};

struct qv_jmethod {
    qv_jvalue self;
    const qv_jcallable *callable;
};

/* ---- Calls ----------------------------------------------------------------------------------- */

typedef struct {
    qv_jstr name;
    qv_jvalue value;
} qv_jnamed;

/* Arguments as they were written. */
typedef struct {
    qv_jvalue *values; /* [n] */
    size_t n;
    qv_jnamed *named; /* [n_named] */
    size_t n_named;
} qv_jargs;

/* What a filter, test, method or function is called with. `self` is the value on the left (absent
 * for functions); args holds the bound parameters, QV_J_ABSENT where none was given. Those with
 * `rest` get further arguments through `all`. */
typedef struct {
    qv_jvalue self;
    qv_jvalue args[QV_J_MAX_PARAMS];
    const qv_jargs *all;
    bool negate; /* of a family of two: reject, rejectattr */
} qv_jcall;

struct qv_jcallable {
    const char *name;
    qv_status (*fn)(qv_jrun *run, qv_jcall *call, qv_jvalue *out);
    const char *params[QV_J_MAX_PARAMS]; /* names, in order */
    uint8_t n_required;
    bool rest;       /* takes any further arguments */
    bool positional; /* its parameters have no names (methods of built-in types) */
    bool negate;
};

/* Check that arguments fit the parameters of a callable; `kind` ("filter") goes into the error,
 * which has no line. Errors: ARG. */
qv_status qv_j_check_args(const char *kind, const qv_jcallable *callable, size_t n,
                          const qv_jstr *names, size_t n_names);

/* An argument that must be text; that must be a whole number, *out left alone when absent.
 * Errors: ARG. */
qv_status qv_j_text_arg(qv_jrun *run, qv_jvalue v, qv_jstr *out);
qv_status qv_j_int_arg(qv_jrun *run, qv_jvalue v, int64_t *out);

/* Bind the arguments and call. */
qv_status qv_j_call(qv_jrun *run, const char *kind, const qv_jcallable *callable, qv_jvalue self,
                    const qv_jargs *args, qv_jvalue *out);

/* Tables by name; NULL if there is none. */
const qv_jcallable *qv_j_find_filter(qv_jstr name);
const qv_jcallable *qv_j_find_test(qv_jstr name);
const qv_jcallable *qv_j_find_function(qv_jstr name);
const qv_jcallable *qv_j_find_in(const qv_jcallable *table, size_t n, qv_jstr name);

const qv_jcallable *qv_j_find_method(qv_jtype type, qv_jstr name);

/* Whether any type has a method of this name (one that we have, or one that is always refused when
 * it runs because it would change its object). */
bool qv_j_is_method(qv_jstr name);

/* ---- Tokens ---------------------------------------------------------------------------------- */

typedef enum {
    QV_JT_EOF,
    QV_JT_DATA,
    QV_JT_VARIABLE_BEGIN,
    QV_JT_VARIABLE_END,
    QV_JT_BLOCK_BEGIN,
    QV_JT_BLOCK_END,
    QV_JT_NAME,
    QV_JT_STRING,
    QV_JT_INTEGER,
    QV_JT_FLOAT,
    QV_JT_ADD,
    QV_JT_SUB,
    QV_JT_MUL,
    QV_JT_DIV,
    QV_JT_FLOORDIV,
    QV_JT_MOD,
    QV_JT_POW,
    QV_JT_TILDE,
    QV_JT_EQ,
    QV_JT_NE,
    QV_JT_LT,
    QV_JT_LE,
    QV_JT_GT,
    QV_JT_GE,
    QV_JT_ASSIGN,
    QV_JT_DOT,
    QV_JT_COMMA,
    QV_JT_COLON,
    QV_JT_SEMICOLON,
    QV_JT_PIPE,
    QV_JT_LPAREN,
    QV_JT_RPAREN,
    QV_JT_LBRACKET,
    QV_JT_RBRACKET,
    QV_JT_LBRACE,
    QV_JT_RBRACE,
} qv_jtoken_type;

typedef struct {
    qv_jtoken_type type;
    uint32_t line;
    qv_jstr text; /* DATA, NAME and (unescaped) STRING: the text; else as written */
    int64_t integer;
    double real;
} qv_jtoken;

/* Cut a template into tokens, EOF last. `text` has its line ends normalised and outlives the
 * tokens; they and unescaped strings are in the arena. `name` goes into errors. Errors: FORMAT,
 * LIMIT, NOMEM. */
qv_status qv_j_tokenize(qv_arena *arena, const char *name, qv_jstr text, qv_jtoken **tokens);

/* How a token is called in errors. */
const char *qv_j_token_name(qv_jtoken_type type);

/* ---- Syntax tree ----------------------------------------------------------------------------- */

typedef enum {
    /* expressions */
    QV_JN_CONST,
    QV_JN_NAME,
    QV_JN_LIST,
    QV_JN_TUPLE, /* also a target of assignment */
    QV_JN_DICT,
    QV_JN_ATTRIBUTE,
    QV_JN_ITEM,
    QV_JN_SLICE,
    QV_JN_CALL,
    QV_JN_FILTER,
    QV_JN_TEST,
    QV_JN_NOT,
    QV_JN_NEGATE,
    QV_JN_PLUS,
    QV_JN_BINARY,
    QV_JN_AND,
    QV_JN_OR,
    QV_JN_COMPARE,
    QV_JN_CONCAT,
    QV_JN_CONDITION,
    QV_JN_NAMESPACE_ATTRIBUTE, /* a target of assignment */
    /* statements */
    QV_JN_DATA,
    QV_JN_PRINT,
    QV_JN_IF,
    QV_JN_FOR,
    QV_JN_SET,
    QV_JN_SET_BLOCK,
    QV_JN_MACRO,
    QV_JN_CALL_BLOCK,
    QV_JN_FILTER_BLOCK,
    QV_JN_WITH,
    QV_JN_SCOPE,
    QV_JN_BREAK,
    QV_JN_CONTINUE,
} qv_jnode_kind;

typedef struct {
    qv_jnode **nodes; /* [n] */
    size_t n;
} qv_jnodes;

/* Comparisons beyond those that are tokens. */
enum { QV_JT_IN = 100, QV_JT_NOT_IN };

typedef struct {
    int op; /* qv_jtoken_type, QV_JT_IN, QV_JT_NOT_IN */
    qv_jnode *right;
} qv_joperand;

typedef struct {
    qv_jnodes values;
    qv_jstr *names;   /* [n_named] */
    qv_jnode **named; /* [n_named] */
    size_t n_named;
} qv_jnode_args;

typedef struct {
    qv_jnode *test; /* NULL: else */
    qv_jnodes body;
} qv_jbranch;

typedef struct {
    uint32_t name;
    qv_jnode *fallback; /* NULL: required */
} qv_jparam;

struct qv_jnode {
    uint8_t kind; /* qv_jnode_kind */
    uint16_t height;
    uint32_t line;
    union {
        qv_jvalue constant;
        uint32_t name;     /* NAME: index into the program's names */
        qv_jnodes items;   /* LIST, TUPLE, CONCAT; DICT: key, value, key, value, ... */
        qv_jnode *operand; /* NOT, NEGATE, PLUS; PRINT */
        qv_jstr data;      /* DATA */
        struct {
            qv_jnode *object;
            qv_jstr name;
        } attribute;
        struct {
            qv_jnode *object, *key;
        } item;
        struct {
            qv_jnode *object, *start, *stop, *step; /* but the object may be NULL */
        } slice;
        struct {
            qv_jnode *callee;
            qv_jnode_args args;
        } call;
        struct {
            qv_jnode *input; /* NULL: the captured text of a block */
            const qv_jcallable *callable;
            qv_jnode_args args;
        } apply; /* FILTER, TEST */
        struct {
            int op; /* qv_jtoken_type */
            qv_jnode *left, *right;
        } binary; /* also AND, OR */
        struct {
            qv_jnode *left;
            qv_joperand *operands; /* [n] */
            size_t n;
        } compare;
        struct {
            qv_jnode *test, *then, *otherwise; /* otherwise may be NULL */
        } condition;
        struct {
            uint32_t name;
            qv_jstr attribute;
        } ns;
        struct {
            qv_jbranch *branches; /* [n] */
            size_t n;
        } choice; /* IF */
        struct {
            qv_jnode *target, *iterable, *test; /* test may be NULL */
            qv_jnodes body, otherwise;
            bool has_macros; /* the body defines some, which keep their scope */
        } loop;
        struct {
            qv_jnode *target, *value; /* SET_BLOCK: a chain of filters, or NULL */
            qv_jnodes body;           /* SET_BLOCK */
        } set;
        struct {
            uint32_t name;     /* MACRO; for CALL_BLOCK that of `caller` */
            qv_jparam *params; /* [n] */
            size_t n;
            qv_jnodes body;
            qv_jnode *call; /* CALL_BLOCK */
            bool uses_caller, uses_varargs, uses_kwargs;
        } macro;
        struct {
            qv_jnode *filter;             /* FILTER_BLOCK: a chain of filters */
            qv_jnode **targets, **values; /* [n] WITH */
            size_t n;
            qv_jnodes body;
        } block; /* FILTER_BLOCK, WITH, SCOPE */
    };
};

/* A parsed template. */
typedef struct {
    qv_arena arena; /* everything below */
    const char *name;
    qv_jstr text;
    qv_jnodes body;
    qv_jstr *names; /* [n_names] every variable that occurs */
    uint32_t n_names;
    uint32_t loop_name, caller_name, varargs_name, kwargs_name; /* always among them */
} qv_jprogram;

/* Parse `len` bytes into a zeroed program. The caller calls deinit, whatever comes back.
 * Errors: FORMAT, UNSUPPORTED, LIMIT, NOMEM. */
qv_status qv_jprogram_parse(qv_jprogram *program, const char *text, size_t len, const char *name);
void qv_jprogram_deinit(qv_jprogram *program);

/* The index of a variable, or UINT32_MAX if the template never mentions it. */
uint32_t qv_jprogram_find_name(const qv_jprogram *program, qv_jstr name);

/* ---- A render -------------------------------------------------------------------------------- */

typedef struct qv_jvariable {
    struct qv_jvariable *next;
    uint32_t name;
    qv_jvalue value; /* absent: not set (again) */
} qv_jvariable;

struct qv_jscope {
    qv_jscope *parent;
    qv_jvariable *variables;
};

typedef enum { QV_J_GO_ON, QV_J_BREAK, QV_J_CONTINUE } qv_jflow;

struct qv_jrun {
    const qv_jprogram *program;
    qv_arena arena; /* every value of this render */
    qv_chat_limits limits;
    uint64_t steps;
    uint32_t depth;
    uint32_t line; /* of the node that runs */
    qv_jflow flow; /* QV_J_BREAK, QV_J_CONTINUE: on the way out of a loop's body */
    uint64_t hash_seed;
    qv_jscope *globals;
    char *out; /* [out_size] what was printed; captures are cut off its end */
    size_t out_len, out_size;
};

/* Run the program with the variables of run->globals; the output is in run->out. */
qv_status qv_j_run(qv_jrun *run);

/* Set a variable of a scope. Errors: LIMIT. */
qv_status qv_j_set(qv_jrun *run, qv_jscope *scope, uint32_t name, qv_jvalue value);

/* Call any callable value. */
qv_status qv_j_call_value(qv_jrun *run, qv_jvalue callee, const qv_jargs *args, qv_jvalue *out);

/* Fail as the template does on this input: ARG, with the line appended. */
qv_status qv_j_fail(qv_jrun *run, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* Fail because a bound is reached: LIMIT, with the line appended. */
qv_status qv_j_limit(qv_jrun *run, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* Account for work on `bytes` bytes. Errors: LIMIT. */
qv_status qv_j_charge(qv_jrun *run, size_t bytes);

/* Account for one more level of nesting; paired with qv_j_leave when it succeeds. Errors: LIMIT. */
qv_status qv_j_enter(qv_jrun *run);
static inline void qv_j_leave(qv_jrun *run)
{
    run->depth--;
}

/* Memory of the run, not initialised. Errors: LIMIT. */
qv_status qv_j_alloc(qv_jrun *run, size_t n, size_t size, void **out);

/* ---- Making values --------------------------------------------------------------------------- */

static inline qv_jvalue qv_j_none(void)
{
    return (qv_jvalue){.type = QV_J_NONE};
}
static inline qv_jvalue qv_j_bool(bool b)
{
    return (qv_jvalue){.type = QV_J_BOOL, .boolean = b};
}
static inline qv_jvalue qv_j_int(int64_t i)
{
    return (qv_jvalue){.type = QV_J_INT, .integer = i};
}
static inline qv_jvalue qv_j_float(double f)
{
    return (qv_jvalue){.type = QV_J_FLOAT, .real = f};
}
static inline qv_jvalue qv_j_str(const char *data, size_t len)
{
    return (qv_jvalue){.type = QV_J_STR, .str = data, .len = len};
}
static inline qv_jvalue qv_j_make_text(qv_jstr s, bool safe)
{
    return (qv_jvalue){.type = QV_J_STR, .safe = safe, .str = s.data, .len = s.len};
}
static inline qv_jstr qv_j_text(qv_jvalue v)
{
    return (qv_jstr){v.str, v.len};
}
static inline bool qv_j_is_absent(qv_jvalue v)
{
    return v.type == QV_J_ABSENT;
}

/* A sequence with room for n items, and n set. Errors: LIMIT. */
qv_status qv_j_seq(qv_jrun *run, qv_jtype type, size_t n, qv_jvalue *out);
qv_status qv_j_pair(qv_jrun *run, qv_jvalue a, qv_jvalue b, qv_jvalue *out); /* a tuple of two */
qv_status qv_j_range(qv_jrun *run, int64_t start, int64_t stop, int64_t step, qv_jvalue *out);

/* An undefined value, by a sentence that outlives the run, or by what was looked up. */
qv_status qv_j_undefined_hint(qv_jrun *run, const char *hint, qv_jvalue *out);
qv_status qv_j_undefined(qv_jrun *run, const char *type, qv_jvalue name, qv_jvalue *out);

/* Fail with what an undefined value has to say. */
qv_status qv_j_fail_undefined(qv_jrun *run, qv_jvalue v);

/* An empty dict (or namespace) with room for n entries; set replaces the value of an equal key.
 * Errors: LIMIT, ARG (a key of a type that cannot be one). */
qv_status qv_j_dict(qv_jrun *run, qv_jtype type, size_t n, qv_jvalue *out);
qv_status qv_j_dict_set(qv_jrun *run, qv_jdict *dict, qv_jvalue key, qv_jvalue value);
/* The entry of a key, or NULL in *out. Errors: ARG (a key of a type that cannot be one). */
qv_status qv_j_dict_find(qv_jrun *run, const qv_jdict *dict, qv_jvalue key, qv_jentry **out);
/* The entry of a string, or NULL. */
qv_jentry *qv_j_dict_find_str(const qv_jrun *run, const qv_jdict *dict, qv_jstr key);

/* From JSON; strings are borrowed. Errors: LIMIT. */
qv_status qv_j_from_json(qv_jrun *run, const json_t *json, qv_jvalue *out);

/* ---- Asking values --------------------------------------------------------------------------- */

/* Python's name of the type, and how jinja2's errors call it ("str object"). */
const char *qv_j_type_name(qv_jvalue v);
const char *qv_j_object_name(qv_jvalue v);

bool qv_j_truth(qv_jvalue v);
/* Whether it counts as a whole number (bools do); *i gets it. */
bool qv_j_as_int(qv_jvalue v, int64_t *i);
/* Whether it is a number; *f gets it. */
bool qv_j_as_float(qv_jvalue v, double *f);

qv_status qv_j_equal(qv_jrun *run, qv_jvalue a, qv_jvalue b, bool *out);
/* Order of a and b (negative, 0, positive; *unordered with NaN). `op` goes into the error. */
qv_status qv_j_compare(qv_jrun *run, qv_jvalue a, qv_jvalue b, const char *op, int *order,
                       bool *unordered);
qv_status qv_j_contains(qv_jrun *run, qv_jvalue container, qv_jvalue v, bool *out);
/* len(v). Errors: ARG. */
qv_status qv_j_length(qv_jrun *run, qv_jvalue v, size_t *out);
/* The items that `for` would visit. An ITER is used up. Errors: ARG, LIMIT. */
qv_status qv_j_iterate(qv_jrun *run, qv_jvalue v, qv_jvalue **items, size_t *n);

/* str(v) and repr(v). */
qv_status qv_j_to_str(qv_jrun *run, qv_jvalue v, qv_jstr *out);
qv_status qv_j_repr(qv_jrun *run, qv_jvalue v, qv_jstr *out);
/* The shortest text that reads back as the same float, as Python writes it; returns its length. */
enum { QV_J_FLOAT_MAX = 32 };
size_t qv_j_float_text(double f, char out[QV_J_FLOAT_MAX]);

/* obj.name and obj[key], as the sandbox of jinja2 gives them. */
qv_status qv_j_attribute(qv_jrun *run, qv_jvalue obj, qv_jstr name, qv_jvalue *out);
qv_status qv_j_item(qv_jrun *run, qv_jvalue obj, qv_jvalue key, qv_jvalue *out);
/* obj[start:stop:step]; absent or none where not given. */
qv_status qv_j_slice(qv_jrun *run, qv_jvalue obj, qv_jvalue start, qv_jvalue stop, qv_jvalue step,
                     qv_jvalue *out);
/* What is known about a loop: loop.index and the like; absent if there is no such attribute. */
qv_status qv_j_loop_attribute(qv_jrun *run, qv_jloop *loop, qv_jstr name, qv_jvalue *out);
qv_status qv_j_loop_cycle(qv_jrun *run, qv_jloop *loop, const qv_jargs *args, qv_jvalue *out);
qv_status qv_j_loop_changed(qv_jrun *run, qv_jloop *loop, const qv_jargs *args, qv_jvalue *out);

/* ---- Text ------------------------------------------------------------------------------------ */

/* Text under construction, in the run's arena. Zero-initialise with the run. */
typedef struct {
    qv_jrun *run;
    char *data;
    size_t len, size;
} qv_jbuilder;

qv_status qv_j_add(qv_jbuilder *b, const char *data, size_t len);
qv_status qv_j_add_char(qv_jbuilder *b, uint32_t cp);
qv_status qv_j_add_repr(qv_jbuilder *b, qv_jvalue v);
static inline qv_status qv_j_add_text(qv_jbuilder *b, qv_jstr s)
{
    return qv_j_add(b, s.data, s.len);
}
static inline qv_jvalue qv_j_built(const qv_jbuilder *b)
{
    return qv_j_str(b->len ? b->data : "", b->len);
}

bool qv_j_str_equal(qv_jstr a, qv_jstr b);
bool qv_j_str_is(qv_jstr a, const char *b);
int qv_j_str_compare(qv_jstr a, qv_jstr b); /* by code point */

/* The byte offset of code point `index` (from the end if negative), clamped to the text. */
size_t qv_j_offset(qv_jstr s, int64_t index);

/* str.isspace of one character; separators of str.splitlines. */
bool qv_j_is_space(uint32_t cp);
bool qv_j_is_line_end(uint32_t cp);
bool qv_j_is_cased(uint32_t cp);

typedef enum { QV_J_UPPER, QV_J_LOWER, QV_J_TITLE, QV_J_CAPITALIZE, QV_J_SWAPCASE } qv_jcase;

qv_status qv_j_change_case(qv_jrun *run, qv_jstr s, qv_jcase to, qv_jstr *out);

typedef enum { QV_J_BOTH, QV_J_LEFT, QV_J_RIGHT } qv_jside;

/* str.strip and its kin; chars.data NULL strips white space. */
qv_jstr qv_j_strip(qv_jstr s, qv_jstr chars, qv_jside side);
/* Byte offset of the first (last) `needle`, or -1. */
ptrdiff_t qv_j_find(qv_jstr s, qv_jstr needle);
ptrdiff_t qv_j_rfind(qv_jstr s, qv_jstr needle);
/* str.replace; count < 0: all. */
qv_status qv_j_replace(qv_jrun *run, qv_jstr s, qv_jstr old, qv_jstr new, int64_t count,
                       qv_jstr *out);
/* str.split and str.rsplit into a list; sep.data NULL splits at white space; max < 0: no limit. */
qv_status qv_j_split(qv_jrun *run, qv_jstr s, qv_jstr sep, int64_t max, bool from_right,
                     qv_jvalue *out);
qv_status qv_j_splitlines(qv_jrun *run, qv_jstr s, bool keep_ends, qv_jvalue *out);
/* HTML escaping, as `escape` does it. */
qv_status qv_j_escape(qv_jrun *run, qv_jstr s, qv_jstr *out);
/* int(s, base) and float(s): whether the text is a number. An integer beyond int64 is none. */
bool qv_j_parse_int(qv_jstr s, int base, int64_t *out);
bool qv_j_parse_float(qv_jstr s, double *out);

/* JSON text, as Python's json.dumps writes it. */
typedef struct {
    bool ascii; /* escape what is not ASCII */
    bool sort_keys;
    qv_jstr indent; /* data NULL: on one line */
    qv_jstr item_separator, key_separator;
} qv_jjson_style;

qv_status qv_j_add_json(qv_jbuilder *b, qv_jvalue v, const qv_jjson_style *style);

/* Operators (jinja_arithmetic.c): a op b, -v or +v, and whether a op b holds. */
qv_status qv_j_binary(qv_jrun *run, int op, qv_jvalue a, qv_jvalue b, qv_jvalue *out);
qv_status qv_j_sign(qv_jrun *run, bool negate, qv_jvalue v, qv_jvalue *out);
qv_status qv_j_relation(qv_jrun *run, int op, qv_jvalue a, qv_jvalue b, bool *out);

/* Order items by key in place, stably: items[i] goes with keys[i]. */
qv_status qv_j_sort(qv_jrun *run, qv_jvalue *items, qv_jvalue *keys, size_t n, bool reverse);

#endif
