//! The TOML form, read.
//!
//! The file is walked by hand rather than by serde, so that every fault has its line and names what would
//! have been right.

mod nvme;

pub(super) use nvme::EFFECTS;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::check::Subject;
use super::device::DeviceOptions;
use super::error::{Place, TopologyError, TopologyFault, hint};
use super::{EndpointOptions, Guest, RootPort, Switch, Topology, sizes, times};

const TOP: &[&str] = &["name", "guest", "root_port", "switch", "endpoint"];
const GUEST: &[&str] = &[
    "memory",
    "cpus",
    "cpu",
    "window",
    "kernel_arguments",
    "load_modules",
    "own_modules",
    "system",
    "packages",
    "kernel",
    "modules",
    "qemu",
];
const ROOT_PORT: &[&str] = &["name"];
const SWITCH: &[&str] = &["name", "below", "ports"];
const DEVICES: &[&str] = &["nvme"];
/// No topology needs more; a file of any size is not read into memory.
const MAX_FILE: u64 = sizes::MIB;

/// A fault and the bytes of the text it lies in.
type Fault = (Range<usize>, Box<TopologyFault>);
type Read<T> = Result<T, Fault>;
type Value<'a> = Spanned<DeValue<'a>>;

impl Topology {
    /// Reads and checks a topology file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// The first fault, with file, line and column.
    pub fn from_toml(file: &Path) -> Result<Self, TopologyError> {
        let unreadable = |error| TopologyError {
            place: Some(Place {
                file: file.to_owned(),
                position: None,
            }),
            fault: TopologyFault::Unreadable(error).into(),
        };
        let size = file.metadata().map_err(unreadable)?.len();
        if size > MAX_FILE {
            return Err(unreadable(std::io::Error::other("it is larger than 1 MiB")));
        }
        let text = std::fs::read_to_string(file).map_err(unreadable)?;
        Self::from_toml_text(&text, file)
    }

    /// Reads and checks the text of a topology file; `file` is what errors call it, and relative paths are
    /// relative to its folder.
    ///
    /// # Errors
    /// The first fault, with file, line and column.
    pub fn from_toml_text(text: &str, file: &Path) -> Result<Self, TopologyError> {
        let folder = file.parent().unwrap_or(Path::new(""));
        let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let mut reader = Reader {
            folder,
            spans: HashMap::new(),
        };
        let read = reader.read(text).and_then(|topology| {
            topology.find_fault().map_err(|finding| {
                let spans = &reader.spans;
                let exact = spans.get(&(finding.subject, finding.field));
                let span = exact.or_else(|| spans.get(&(finding.subject, ""))).cloned();
                (span.unwrap_or_default(), finding.fault)
            })?;
            Ok(topology)
        });
        read.map_err(|(span, fault)| {
            let position = Some(position(text, span.start));
            TopologyError {
                place: Some(Place {
                    file: file.to_owned(),
                    position,
                }),
                fault,
            }
        })
    }
}

/// Line and column of byte `offset`, both from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    (line, column)
}

struct Reader {
    folder: PathBuf,
    /// Where each thing and each of its fields stands; the thing itself under the empty field.
    spans: HashMap<(Subject, &'static str), Range<usize>>,
}

impl Reader {
    fn read(&mut self, text: &str) -> Read<Topology> {
        let table = DeTable::parse(text).map_err(|error| {
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            (
                error.span().unwrap_or_default(),
                TopologyFault::Syntax(message).into(),
            )
        })?;
        let top = Fields::new("a topology", 0..0, table.get_ref(), TOP)?;
        top.note(Subject::Topology, self);
        let name = top.text("name", "name = \"one-switch\"")?;
        let guest = match top.get("guest") {
            Some(value) => self.guest(value)?,
            None => Guest::default(),
        };
        let mut topology = Topology {
            name,
            guest,
            root_ports: vec![],
            switches: vec![],
            endpoints: vec![],
        };
        for (index, value) in top.tables("root_port", "[[root_port]]")?.iter().enumerate() {
            let fields = Fields::of("a root port", value, ROOT_PORT)?;
            fields.note(Subject::RootPort(index), self);
            topology.root_ports.push(RootPort {
                name: fields.text("name", "name = \"rp0\"")?,
            });
        }
        for (index, value) in top.tables("switch", "[[switch]]")?.iter().enumerate() {
            let fields = Fields::of("a switch", value, SWITCH)?;
            fields.note(Subject::Switch(index), self);
            topology.switches.push(switch(&fields)?);
        }
        for (index, value) in top.tables("endpoint", "[[endpoint]]")?.iter().enumerate() {
            topology.endpoints.push(self.endpoint(index, value)?);
        }
        Ok(topology)
    }

    fn guest(&mut self, value: &Value<'_>) -> Read<Guest> {
        let fields = Fields::of("[guest]", value, GUEST)?;
        fields.note(Subject::Guest, self);
        let default = Guest::default();
        Ok(Guest {
            memory: fields.size("memory")?.unwrap_or(default.memory),
            cpus: fields.number("cpus")?.unwrap_or(default.cpus),
            cpu: fields.optional_text("cpu")?.unwrap_or(default.cpu),
            kernel_arguments: fields.list("kernel_arguments")?.unwrap_or_default(),
            kernel: self.path(&fields, "kernel")?,
            modules: self.path(&fields, "modules")?,
            load_modules: fields.list("load_modules")?.unwrap_or_default(),
            own_modules: fields.list("own_modules")?.unwrap_or_default(),
            system: fields.flag("system")?.unwrap_or(default.system),
            packages: fields.list("packages")?.unwrap_or_default(),
            qemu: self.path(&fields, "qemu")?,
            window: fields.size("window")?.unwrap_or(default.window),
        })
    }

    fn endpoint(&mut self, index: usize, value: &Value<'_>) -> Read<EndpointOptions> {
        const CONTEXT: &str = "an nvme endpoint";
        // The device decides which fields there are, so it is looked at first.
        let device = Fields::unchecked("an endpoint", value)?;
        device.word("device", "device = \"nvme\"", DEVICES)?;
        let fields = Fields::of(CONTEXT, value, nvme::FIELDS)?;
        fields.note(Subject::Endpoint(index), self);
        Ok(EndpointOptions {
            name: fields.text("name", "name = \"ssd0\"")?,
            port: fields.text("port", "port = \"sw0.0\"")?,
            device: DeviceOptions::Nvme(self.nvme(&fields)?),
        })
    }

    /// A path, made absolute from the file's folder.
    fn path(&self, fields: &Fields<'_>, field: &'static str) -> Read<Option<PathBuf>> {
        let path = fields.optional_text(field)?;
        // An empty path would become the folder, and be another mistake than it is.
        Ok(path.map(|path| {
            if path.is_empty() {
                PathBuf::new()
            } else {
                self.folder.join(path)
            }
        }))
    }
}

fn switch(fields: &Fields<'_>) -> Read<Switch> {
    Ok(Switch {
        name: fields.text("name", "name = \"sw0\"")?,
        below: fields.text("below", "below = \"rp0\"")?,
        ports: fields
            .list("ports")?
            .ok_or_else(|| fields.missing("ports", "ports = [\"sw0.0\", \"sw0.1\"]"))?,
    })
}

/// A table with the names that its fields may have.
struct Fields<'a> {
    context: &'static str,
    span: Range<usize>,
    table: &'a DeTable<'a>,
    valid: &'static [&'static str],
}

impl<'a> Fields<'a> {
    fn new(
        context: &'static str,
        span: Range<usize>,
        table: &'a DeTable<'a>,
        valid: &'static [&'static str],
    ) -> Read<Self> {
        // Tables are kept in alphabetic order; the first fault in the file is the one to report.
        let unknown = table
            .iter()
            .map(|(key, _)| key)
            .filter(|key| !valid.contains(&&**key.get_ref()));
        if let Some(key) = unknown.min_by_key(|key| key.span().start) {
            let field = key.get_ref().chars().take(64).collect::<String>();
            let hint = hint(&field, "field", valid);
            return Err((
                key.span(),
                TopologyFault::UnknownField {
                    context,
                    field,
                    hint,
                }
                .into(),
            ));
        }
        Ok(Self {
            context,
            span,
            table,
            valid,
        })
    }

    fn of(
        context: &'static str,
        value: &'a Value<'a>,
        valid: &'static [&'static str],
    ) -> Read<Self> {
        let Self { span, table, .. } = Self::unchecked(context, value)?;
        Self::new(context, span, table, valid)
    }

    fn unchecked(context: &'static str, value: &'a Value<'a>) -> Read<Self> {
        let Some(table) = value.get_ref().as_table() else {
            return Err(wrong_type(context, "a table", value));
        };
        Ok(Self {
            context,
            span: value.span(),
            table,
            valid: &[],
        })
    }

    /// Remembers where the table and its fields stand.
    fn note(&self, subject: Subject, reader: &mut Reader) {
        reader.spans.insert((subject, ""), self.span.clone());
        for field in self.valid {
            if self.get(field).is_some() {
                reader.spans.insert((subject, field), self.span(field));
            }
        }
    }

    fn get(&self, field: &str) -> Option<&'a Value<'a>> {
        self.table.get(field)
    }

    fn span(&self, field: &str) -> Range<usize> {
        let value = self.get(field).map(Spanned::span);
        // An array of tables has no place of its own in every case; its first table has.
        value
            .filter(|span| !span.is_empty())
            .unwrap_or_else(|| self.span.clone())
    }

    fn missing(&self, field: &'static str, example: &'static str) -> Fault {
        let fault = TopologyFault::MissingField {
            context: self.context,
            field,
            example,
        };
        (self.span.clone(), fault.into())
    }

    fn text(&self, field: &'static str, example: &'static str) -> Read<String> {
        self.optional_text(field)?
            .ok_or_else(|| self.missing(field, example))
    }

    fn optional_text(&self, field: &'static str) -> Read<Option<String>> {
        self.get(field).map(|value| text(field, value)).transpose()
    }

    /// One of the words that are `valid`.
    fn word(
        &self,
        field: &'static str,
        example: &'static str,
        valid: &'static [&'static str],
    ) -> Read<&'static str> {
        let word = self.text(field, example)?;
        if let Some(found) = valid.iter().find(|valid| **valid == word) {
            return Ok(found);
        }
        let word = word.chars().take(64).collect::<String>();
        let hint = hint(&word, "value", valid);
        Err((
            self.span(field),
            TopologyFault::UnknownWord { field, word, hint }.into(),
        ))
    }

    fn flag(&self, field: &'static str) -> Read<Option<bool>> {
        let flag = |value: &Value<'_>| {
            let wanted = "true or false";
            value
                .get_ref()
                .as_bool()
                .ok_or_else(|| wrong_type(field, wanted, value))
        };
        self.get(field).map(flag).transpose()
    }

    fn number<T: TryFrom<u64>>(&self, field: &'static str) -> Read<Option<T>> {
        let number = |value: &Value<'_>| {
            let number = integer(value).and_then(|number| T::try_from(number).ok());
            number.ok_or_else(|| wrong_type(field, "a small whole number", value))
        };
        self.get(field).map(number).transpose()
    }

    /// A time, as a text such as `"100ms"`.
    fn time(&self, field: &'static str) -> Read<Option<Duration>> {
        let time = |value: &Value<'_>| {
            let text = value.get_ref().as_str();
            let text = text.ok_or_else(|| wrong_type(field, "a time such as \"100ms\"", value))?;
            times::parse(text)
                .map_err(|error| (value.span(), TopologyFault::BadTime { field, error }.into()))
        };
        self.get(field).map(time).transpose()
    }

    /// Bytes, as a text such as `"64MiB"` or as a number.
    fn size(&self, field: &'static str) -> Read<Option<u64>> {
        let size = |value: &Value<'_>| match value.get_ref() {
            DeValue::String(text) => sizes::parse(text)
                .map_err(|error| (value.span(), TopologyFault::BadSize { field, error }.into())),
            _ => integer(value).ok_or_else(|| {
                wrong_type(
                    field,
                    "a size such as \"64MiB\" or a number of bytes",
                    value,
                )
            }),
        };
        self.get(field).map(size).transpose()
    }

    fn list(&self, field: &'static str) -> Read<Option<Vec<String>>> {
        let list = |value: &'a Value<'a>| {
            let wanted = "a list of texts such as [\"a\", \"b\"]";
            let array = value
                .get_ref()
                .as_array()
                .ok_or_else(|| wrong_type(field, wanted, value))?;
            array.iter().map(|value| text(field, value)).collect()
        };
        self.get(field).map(list).transpose()
    }

    fn tables(&self, field: &'static str, wanted: &'static str) -> Read<Vec<&'a Value<'a>>> {
        let Some(value) = self.get(field) else {
            return Ok(Vec::new());
        };
        let array = value.get_ref().as_array();
        let array = array.filter(|array| array.iter().all(|value| value.get_ref().is_table()));
        let array = array.ok_or_else(|| {
            let fault = TopologyFault::WrongType {
                field: field.to_owned(),
                wanted: "one or more tables, each headed by its name in double brackets",
                found: wanted_found(value, wanted),
            };
            (value.span(), fault.into())
        })?;
        Ok(array.iter().collect())
    }
}

/// A single table where several are allowed is the usual mistake, and has a name of its own.
fn wanted_found(value: &Value<'_>, wanted: &'static str) -> &'static str {
    match (value.get_ref().is_table(), wanted) {
        (true, "[[root_port]]") => "the single table [root_port]",
        (true, "[[switch]]") => "the single table [switch]",
        (true, "[[endpoint]]") => "the single table [endpoint]",
        _ => value.get_ref().type_str(),
    }
}

fn text(field: &'static str, value: &Value<'_>) -> Read<String> {
    let text = value.get_ref().as_str().map(str::to_owned);
    text.ok_or_else(|| wrong_type(field, "a text in quotes", value))
}

fn integer(value: &Value<'_>) -> Option<u64> {
    let integer = value.get_ref().as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn wrong_type(field: &str, wanted: &'static str, value: &Value<'_>) -> Fault {
    let fault = TopologyFault::WrongType {
        field: field.to_owned(),
        wanted,
        found: match value.get_ref() {
            DeValue::Integer(_) => "this number",
            other => other.type_str(),
        },
    };
    (value.span(), fault.into())
}
