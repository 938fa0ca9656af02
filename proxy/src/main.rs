mod redirect;

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((first, rest)) if first == "redirect" => redirect::main(rest),
        _ => std::process::ExitCode::FAILURE,
    }
}
